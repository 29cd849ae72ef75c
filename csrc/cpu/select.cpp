#include "csrc/cpu/select.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace rnn_fused {

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::portable: return "portable";
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
    case Isa::avx512_bf16: return "avx512_bf16";
  }
  return "?";
}

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
  }
#endif
  return isa == Isa::portable;
}

bool has_amx_bf16() {
#if defined(__x86_64__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);
#else
  return false;
#endif
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
