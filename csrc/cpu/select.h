// The instruction set, chosen once: the best that the CPU and the operating system support, or the
// one that the environment variable RNN_FUSED_CPU_ISA names.
#pragma once

namespace rnn_fused {

enum class Isa { portable, avx2, avx512, avx512_bf16, amx_bf16 };
constexpr Isa kAllIsas[] = {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::amx_bf16};

const char* isa_name(Isa isa);

// Compiled into this build and runnable on this machine. Of AMX, asks the kernel for its registers.
bool isa_supported(Isa isa);

// Throws std::invalid_argument where RNN_FUSED_CPU_ISA is unknown or not supported.
Isa selected_isa();

}  // namespace rnn_fused
