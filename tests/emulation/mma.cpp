// The arithmetic of the mma twins, apart from primitives.h so that it is compiled without
// sanitizers: they would only slow it down, since nothing here is memory of the kernel.
#include <bit>

#include "tests/emulation/primitives.h"

namespace rnn_fused::gpu {
namespace {

// The fragments of one lane.
struct Operands {
  uint32_t a[4], b[2];
};

emulation::Lanes<Operands> exchange_operands(const uint32_t (&a)[4], const uint32_t (&b)[2],
                                             emulation::Place place) {
  return emulation::exchange(~0u, Operands{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}}, place);
}

// d += the product of the matrices that A(row, k) and B(k, column) give, in this lane's part of D.
template <int K, class A, class B>
void multiply_add(float (&d)[4], A&& a, B&& b) {
  const int g = emulation::lane() / 4, t = emulation::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = g + 8 * (i / 2), column = 2 * t + i % 2;
    float sum = 0;
    for (int k = 0; k < K; ++k) sum += a(row, k) * b(k, column);
    d[i] += sum;
  }
}

// One of the two values in a register.
template <class T>
float value_in(uint32_t bits, int half) {
  return static_cast<float>(std::bit_cast<T>(static_cast<uint16_t>(bits >> (16 * half))));
}

float tf32_in(uint32_t bits) { return __uint_as_float(bits & ~0x1fffu); }

}  // namespace

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  emulation::Place caller) {
  const auto lanes = exchange_operands(a, b, caller);
  multiply_add<16>(
      d,
      [&](int row, int k) {
        const uint32_t pair = lanes[4 * (row % 8) + k % 8 / 2].a[row / 8 + 2 * (k / 8)];
        return value_in<T>(pair, k % 2);
      },
      [&](int k, int column) {
        return value_in<T>(lanes[4 * column + k % 8 / 2].b[k / 8], k % 2);
      });
}

template void mma_m16n8k16<__nv_bfloat16>(float (&)[4], const uint32_t (&)[4],
                                          const uint32_t (&)[2], emulation::Place);
template void mma_m16n8k16<__half>(float (&)[4], const uint32_t (&)[4], const uint32_t (&)[2],
                                   emulation::Place);

void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                      emulation::Place caller) {
  const auto lanes = exchange_operands(a, b, caller);
  multiply_add<8>(
      d,
      [&](int row, int k) {
        return tf32_in(lanes[4 * (row % 8) + k % 4].a[row / 8 + 2 * (k / 4)]);
      },
      [&](int k, int column) { return tf32_in(lanes[4 * column + k % 4].b[k / 4]); });
}

}  // namespace rnn_fused::gpu
