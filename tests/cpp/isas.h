// The instruction sets that a test can run.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <vector>

#include "csrc/cpu/select.h"

namespace rnn_fused {

// Those of this machine whose kernels are in this build, from portable to the best.
inline std::vector<Isa> tested_isas() {
  const std::initializer_list<Isa> left_out = {RNN_FUSED_LEFT_OUT};
  std::vector<Isa> isas;
  for (Isa isa : kAllIsas)
    if (isa_supported(isa) && std::find(left_out.begin(), left_out.end(), isa) == left_out.end())
      isas.push_back(isa);
  return isas;
}

}  // namespace rnn_fused
