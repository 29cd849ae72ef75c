#define RNN_FUSED_ISA amx_bf16
#define RNN_FUSED_VECTOR_BYTES 64
#define RNN_FUSED_AMX
#include "csrc/cpu/kernels.h"
