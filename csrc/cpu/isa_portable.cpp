#define RNN_FUSED_ISA portable
#define RNN_FUSED_VECTOR_BYTES 16
#include "csrc/cpu/kernels.h"
