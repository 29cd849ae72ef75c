#define RNN_FUSED_ISA avx2
#define RNN_FUSED_VECTOR_BYTES 32
#include "csrc/cpu/kernels.h"
