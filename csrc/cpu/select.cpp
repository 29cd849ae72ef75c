#include "csrc/cpu/select.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace rnn_fused {

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::portable: return "portable";
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
    case Isa::avx512_bf16: return "avx512_bf16";
    case Isa::amx_bf16: return "amx_bf16";
  }
  return "?";
}

#if defined(__x86_64__)
// The processor has tile registers that multiply bfloat16, and the kernel lets this process use
// them. It has to be asked once, by whoever comes first; a signal stack too small for them is a
// reason to say no.
static bool may_use_amx_bf16() {
#if defined(RNN_FUSED_EMULATED_AMX)
  return true;
#elif defined(__linux__)
  static const bool allowed = [] {
    constexpr unsigned kTile = 1u << 24, kBf16 = 1u << 22;       // of cpuid
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl(2), linux 5.16
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kTile) && (d & kBf16) &&
           syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return allowed;
#else
  return false;
#endif
}
#endif

bool isa_supported(Isa isa) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  switch (isa) {
    case Isa::portable: return true;
    case Isa::avx2: return avx2;
    case Isa::avx512: return avx512;
    case Isa::avx512_bf16: return avx512 && __builtin_cpu_supports("avx512bf16");
    case Isa::amx_bf16: return avx512 && __builtin_cpu_supports("avx512bf16") && may_use_amx_bf16();
  }
#endif
  return isa == Isa::portable;
}

static Isa choose() {
  const char* wish = std::getenv("RNN_FUSED_CPU_ISA");
  std::string supported;
  Isa best = Isa::portable;
  for (Isa isa : kAllIsas) {
    if (!isa_supported(isa)) continue;
    if (wish && std::string(wish) == isa_name(isa)) return isa;
    supported += std::string(supported.empty() ? "" : ", ") + isa_name(isa);
    best = isa;
  }
  if (wish && *wish)
    throw std::invalid_argument("RNN_FUSED_CPU_ISA must be one of " + supported +
                                " on this machine, got '" + wish + "'");
  return best;
}

Isa selected_isa() {
  static const Isa isa = choose();  // a throw leaves it unset, so that every call reports it
  return isa;
}

}  // namespace rnn_fused
