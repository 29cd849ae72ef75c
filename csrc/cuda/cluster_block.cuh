// What the cluster kernels of both passes have in common: which steps a cluster takes part in, and
// their launch.
#pragma once

#include "csrc/cuda/persistent_block.cuh"

namespace rnn_fused::persistent {

// Which of some steps have sequences of a cluster's slice. Sequences join as time goes down, and
// leave as it goes up.
__device__ inline Range cluster_steps(const LayerShape& shape, bool down, Slice slice,
                                      Range steps) {
  if (!shape.batch_sizes) return steps;
  // The first step in which that changes.
  int64_t low = steps.begin, high = steps.end;
  while (low < high) {
    const int64_t s = (low + high) / 2;
    if ((slice.step_at(down, s).active > 0) == down)
      high = s;
    else
      low = s + 1;
  }
  return down ? Range{low, steps.end} : Range{steps.begin, low};
}

// kernel_of(cell, units): the kernel for these std::integral_constants.
template <class Policy, class Params, class KernelOf>
void launch_cluster(const CudaPlan& plan, const Params& params, cudaStream_t stream,
                    KernelOf kernel_of) {
  const auto launch = [&](void (*kernel)(Params, int)) {
    const auto slices = static_cast<unsigned>(slice_count(plan, params));
    const dim3 grid(plan.cluster, params.directions, slices);
    gpu::launch_clusters(plan.cluster, kernel, grid, kThreads, plan.shared_bytes, stream, params,
                         plan.batch_tile);
  };
  with_kernels_of(params.cell, [&](auto cell) {
    if (plan.units == 16) return launch(kernel_of(cell, std::integral_constant<int, 16>()));
    if constexpr (cluster_holds(cell, sizeof(typename Policy::T), 32))
      launch(kernel_of(cell, std::integral_constant<int, 32>()));
  });
}

}  // namespace rnn_fused::persistent
