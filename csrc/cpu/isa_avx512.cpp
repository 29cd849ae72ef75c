#define RNN_FUSED_ISA avx512
#define RNN_FUSED_VECTOR_BYTES 64
#include "csrc/cpu/kernels.h"
