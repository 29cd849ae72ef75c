#define RNN_FUSED_ISA avx512_bf16
#define RNN_FUSED_VECTOR_BYTES 64
#include "csrc/cpu/kernels.h"
