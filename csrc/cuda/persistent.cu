#include "csrc/cuda/persistent.h"

#include <stdexcept>

#include "csrc/cuda/exchange.cuh"

namespace rnn_fused {

namespace persistent {

// Each policy in a file of its own in inst/, so that they compile side by side.
template <class Policy>
void launch_forward(const CudaPlan&, const ForwardParams&, void*, cudaStream_t);
template <class Policy>
void launch_cluster_forward(const CudaPlan&, const ForwardParams&, cudaStream_t);
template <class Policy>
void launch_backward(const CudaPlan&, const BackwardParams&, void*, cudaStream_t);
template <class Policy>
void launch_cluster_backward(const CudaPlan&, const BackwardParams&, cudaStream_t);

// Calls body.operator()<Policy>().
template <class Body>
void with_policy(const CudaPlan& plan, DType dtype, Precision precision, const Body& body) {
  if (plan.family == Family::stepwise || dtype == DType::f64)
    throw std::invalid_argument(
        "[persistent] needs a plan for the persistent kernels, got one for "
        "the stepwise ones: " +
        plan.why);
  if (dtype == DType::bf16) return body.template operator()<Mma<__nv_bfloat16>>();
  if (dtype == DType::f16) return body.template operator()<Mma<__half>>();
  if (precision == Precision::tf32) return body.template operator()<Tf32>();
  body.template operator()<Ffma>();
}

}  // namespace persistent

int64_t persistent_workspace(const CudaPlan& plan, const LayerShape& shape, bool backward) {
  using namespace persistent;
  if (plan.family == Family::cluster) return 0;
  const int element_bytes = shape.dtype == DType::f32 ? 4 : 2;
  const int64_t values = exchanged_values(shape, backward, plan.family == Family::handoff);
  const int64_t octet = octet_bytes(columns_of(shape.cell, backward), element_bytes);
  return kBarrierBytes + shape.directions * values * element_bytes +
         plan.blocks * plan.streamed_octets * octet;
}

void persistent_forward(const CudaPlan& plan, Precision precision, const ForwardParams& params,
                        void* workspace, cudaStream_t stream) {
  persistent::with_policy(plan, params.dtype, precision, [&]<class Policy>() {
    if (plan.family == Family::cluster)
      persistent::launch_cluster_forward<Policy>(plan, params, stream);
    else
      persistent::launch_forward<Policy>(plan, params, workspace, stream);
  });
}

void persistent_backward(const CudaPlan& plan, Precision precision, const BackwardParams& params,
                         void* workspace, cudaStream_t stream) {
  persistent::with_policy(plan, params.dtype, precision, [&]<class Policy>() {
    if (plan.family == Family::cluster)
      persistent::launch_cluster_backward<Policy>(plan, params, stream);
    else
      persistent::launch_backward<Policy>(plan, params, workspace, stream);
  });
}

}  // namespace rnn_fused
