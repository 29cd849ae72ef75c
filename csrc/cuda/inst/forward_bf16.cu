#include "csrc/cuda/cluster_forward.cuh"

template void rnn_fused::persistent::launch_forward<rnn_fused::persistent::Mma<__nv_bfloat16>>(
    const rnn_fused::CudaPlan&, const rnn_fused::ForwardParams&, void*, cudaStream_t);

template void
rnn_fused::persistent::launch_cluster_forward<rnn_fused::persistent::Mma<__nv_bfloat16>>(
    const rnn_fused::CudaPlan&, const rnn_fused::ForwardParams&, cudaStream_t);
