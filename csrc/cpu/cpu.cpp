#include "csrc/cpu/cpu.h"

namespace rnn_fused {

namespace {

template <class Params>
using Kernel = void (*)(const Params&, const Schedule&, const Host&);

Range timesteps(const ForwardParams& params, int) { return {0, params.T}; }
Range timesteps(const BackwardParams& params, int d) { return params.timesteps(d); }

bool packed(const ForwardParams& params) { return params.direction[0].packed != nullptr; }
bool packed(const BackwardParams&) { return false; }

template <class Params>
void run(Kernel<Params> kernel, const Params& params, const Host& host) {
  Plan plan = plan_layer(params, host.threads);
  plan.pack = plan.pack && !packed(params);
  std::vector<Range> rows;
  for (int d = 0; d < params.directions; ++d) {
    const std::vector<Range> own = balanced_rows(params, timesteps(params, d), plan.row_parts);
    rows.insert(rows.end(), own.begin(), own.end());
  }
  kernel(params, {plan, rows.data()}, host);
}

}  // namespace

#if defined(__x86_64__)
#define RNN_FUSED_KERNEL(pass)                   \
  (isa == Isa::amx_bf16      ? amx_bf16::pass    \
   : isa == Isa::avx512_bf16 ? avx512_bf16::pass \
   : isa == Isa::avx512      ? avx512::pass      \
   : isa == Isa::avx2        ? avx2::pass        \
                             : portable::pass)
#else
#define RNN_FUSED_KERNEL(pass) (static_cast<void>(isa), portable::pass)
#endif

void cpu_forward(Isa isa, const ForwardParams& params, const Host& host) {
  run<ForwardParams>(RNN_FUSED_KERNEL(forward), params, host);
}

void cpu_forward_stack(Isa isa, const ForwardParams* layers, int64_t count, const Host& host) {
  const int64_t parts = plan_stack(layers[0], count, host.threads);
  if (parts == 1) {
    for (int64_t l = 0; l < count; ++l) cpu_forward(isa, layers[l], host);
    return;
  }
  Plan plan;
  plan.window = kTimestepsBehind;
  const Range rows = {0, layers[0].B};
  RNN_FUSED_KERNEL(forward_stack)({layers, count, parts}, {plan, &rows}, host);
}

void cpu_backward(Isa isa, const BackwardParams& params, const Host& host) {
  run<BackwardParams>(RNN_FUSED_KERNEL(backward), params, host);
}

void cpu_gates(Isa isa, const GatesParams& params, const Host& host) {
  RNN_FUSED_KERNEL(gates)(params, host);
}

void cpu_input_gradient(Isa isa, const InputGradientParams& params, const Host& host) {
  RNN_FUSED_KERNEL(input_gradient)(params, host);
}

void cpu_outer_product(Isa isa, const OuterProductParams& params, const Host& host) {
  RNN_FUSED_KERNEL(outer_product)(params, host);
}

int64_t cpu_pack_weights(Isa isa, const PackParams& params, void* out) {
  return RNN_FUSED_KERNEL(pack_weights)(params, out);
}

}  // namespace rnn_fused
