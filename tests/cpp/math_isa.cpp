// Compiled once per instruction set, with its flags and with RNN_FUSED_ISA naming it.
#include "tests/cpp/math_isa.h"

#if defined(__AVX512F__)
#define RNN_FUSED_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define RNN_FUSED_VECTOR_BYTES 32
#else
#define RNN_FUSED_VECTOR_BYTES 16
#endif
#include "csrc/cpu/math.h"

namespace rnn_fused::RNN_FUSED_ISA {
namespace {

template <class A, Vec<A> (*kFunction)(Vec<A>)>
void activate(const A* x, A* y, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes<A>) store(y + i, kFunction(load(x + i)));
}

template <class A>
constexpr Activations<A> kActivations = {activate<A, Math<A>::sigmoid>, activate<A, Math<A>::tanh>,
                                         activate<A, Math<A>::relu>};

template <class T>
void load_all(const uint16_t* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes<float>)
    store(y + i, load(reinterpret_cast<const T*>(x + i)));
}

template <class T>
void store_all(const float* x, uint16_t* y, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes<float>) store(reinterpret_cast<T*>(y + i), load(x + i));
}

}  // namespace

// Constant-initialised: no code of this file runs before a test has asked for the instruction set.
constinit const IsaMath math = {kActivations<float>,
                                kActivations<double>,
                                {load_all<bf16>, store_all<bf16>},
                                {load_all<f16>, store_all<f16>}};

}  // namespace rnn_fused::RNN_FUSED_ISA
