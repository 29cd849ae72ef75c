// The instruction set, chosen once: the best that the CPU and the operating system support, or the
// one that the environment variable RNN_FUSED_CPU_ISA names.
#pragma once

namespace rnn_fused {

enum class Isa { portable, avx2, avx512, avx512_bf16 };
constexpr Isa kAllIsas[] = {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512_bf16};

const char* isa_name(Isa isa);

// Compiled into this build and runnable on this machine.
bool isa_supported(Isa isa);

// The CPU has tile instructions for bfloat16, which torch's library uses and these kernels do not.
bool has_amx_bf16();

// Throws std::invalid_argument where RNN_FUSED_CPU_ISA is unknown or not supported.
Isa selected_isa();

}  // namespace rnn_fused
