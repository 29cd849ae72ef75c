#include "csrc/cuda/cluster_backward.cuh"
#include "csrc/cuda/split_backward.cuh"

template void rnn_fused::persistent::launch_backward<rnn_fused::persistent::Tf32>(
    const rnn_fused::CudaPlan&, const rnn_fused::BackwardParams&, void*, cudaStream_t);

template void rnn_fused::persistent::launch_cluster_backward<rnn_fused::persistent::Tf32>(
    const rnn_fused::CudaPlan&, const rnn_fused::BackwardParams&, cudaStream_t);
