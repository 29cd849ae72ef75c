// Functions that kernels on the host and on the device share. Always inlined: the host compiles
// them once per instruction set, and the linker must not replace one version by another.
#pragma once

#ifdef __CUDACC__
#define RNN_FUSED_HD __host__ __device__ __forceinline__
#else
#define RNN_FUSED_HD inline __attribute__((always_inline))
#endif
