// rnn_fused._C: what this build is made of and what this machine can run. Torch-free.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

#include "csrc/cpu/select.h"

namespace py = pybind11;

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#else
constexpr const char* kCompiler = "g++ " __VERSION__;
#endif

// The build passes lists as one comma-separated macro; "" is the empty list.
std::vector<std::string> split(const std::string& list) {
  std::vector<std::string> items;
  std::istringstream stream(list);
  for (std::string item; std::getline(stream, item, ',');) items.push_back(item);
  return items;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (rnn_fused::Isa isa : rnn_fused::kAllIsas)
    if (rnn_fused::isa_supported(isa)) names.emplace_back(rnn_fused::isa_name(isa));
  return names;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("compiler") = kCompiler;
  m.attr("torch_target") = RNN_FUSED_TORCH_TARGET;
  m.attr("cuda_version") = RNN_FUSED_CUDA_VERSION;
  m.attr("cuda_archs") = split(RNN_FUSED_CUDA_ARCHS);
  m.attr("compiled_isas") = split(RNN_FUSED_ISAS);
  m.def("supported_isas", &supported_isas);
  // ValueError where RNN_FUSED_CPU_ISA names no instruction set that this machine can run.
  m.def("selected_isa", [] { return std::string(rnn_fused::isa_name(rnn_fused::selected_isa())); });
}
