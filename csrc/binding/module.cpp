// rnn_fused._C: what this build is made of and what this machine can run. Torch-free.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

#include "csrc/cpu/plan.h"
#include "csrc/cpu/select.h"
#include "csrc/cuda/plan.h"
#include "csrc/cuda/predict.h"

namespace py = pybind11;

namespace rnn_fused {
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
  for (Isa isa : kAllIsas)
    if (isa_supported(isa)) names.emplace_back(isa_name(isa));
  return names;
}

template <class T>
T named(const std::string& name, std::initializer_list<std::pair<const char*, T>> names) {
  for (const auto& [known, value] : names)
    if (name == known) return value;
  throw py::value_error("unknown name '" + name + "'");
}

// Of a dense layer.
LayerShape layer_shape(const std::string& cell, const std::string& dtype, int64_t T, int64_t B,
                       int64_t H, int64_t P, int directions) {
  return {
      named<Cell>(cell, {{"lstm", Cell::lstm},
                         {"gru", Cell::gru},
                         {"rnn_tanh", Cell::rnn_tanh},
                         {"rnn_relu", Cell::rnn_relu}}),
      named<DType>(
          dtype,
          {{"f32", DType::f32}, {"f64", DType::f64}, {"bf16", DType::bf16}, {"f16", DType::f16}}),
      T,
      B,
      H,
      P,
      directions,
      nullptr,
      nullptr};
}

py::dict cpu_plan(const std::string& cell, const std::string& dtype, int64_t T, int64_t B,
                  int64_t H, int64_t P, int directions, int64_t layers, int threads) {
  const LayerShape shape = layer_shape(cell, dtype, T, B, H, P, directions);
  const Plan plan = plan_layer(shape, threads);
  py::dict result;
  result["pack"] = plan.pack;
  result["row_parts"] = plan.row_parts;
  result["unit_parts"] = plan.unit_parts;
  result["stack_parts"] = plan_stack(shape, layers, threads);
  result["timesteps_behind"] = kTimestepsBehind;
  return result;
}

// The fields of GpuProperties.
using Gpu = std::tuple<int, int, int64_t, int64_t, int64_t>;

GpuProperties properties(const Gpu& gpu) {
  const auto& [capability, sms, registers, shared, shared_of_block] = gpu;
  return {capability, sms, registers, shared, shared_of_block};
}

// The plan and what a step of it is expected to cost, in microseconds.
py::dict as_dict(const LayerShape& shape, Precision precision, const Gpu& gpu, const CudaPlan& plan,
                 bool backward) {
  const StepCost cost = predict_step(shape, precision, properties(gpu), plan, backward);
  py::dict result, step;
  step["waits"] = cost.waits;
  step["traffic"] = cost.traffic;
  step["shared"] = cost.shared;
  step["maths"] = cost.maths;
  result["step_us"] = step;
  result["family"] = kFamilyNames[static_cast<int>(plan.family)];
  result["units"] = plan.units;
  result["warps"] = plan.warps;
  result["k_blocks"] = plan.k_blocks;
  result["register_blocks"] = plan.register_blocks;
  result["shared_octets"] = plan.shared_octets;
  result["streamed_octets"] = plan.streamed_octets;
  result["slice"] = plan.slice;
  result["slices"] = slice_count(plan, shape);
  result["launches"] = plan.launches;
  result["batch_tile"] = plan.batch_tile;
  result["blocks"] = plan.blocks;
  result["cluster"] = plan.cluster;
  result["shared_bytes"] = plan.shared_bytes;
  result["why"] = plan.why;
  return result;
}

std::optional<Family> forced_family(const std::string& kernels) {
  const std::optional<Family> forced = family_named(kernels);
  if (!forced && kernels != "auto") throw py::value_error("unknown kernels '" + kernels + "'");
  return forced;
}

py::dict cuda_plan(const std::string& cell, const std::string& dtype, int64_t T, int64_t B,
                   int64_t H, int64_t P, int directions, bool allow_tf32, const Gpu& gpu,
                   bool backward, const std::string& kernels) {
  const LayerShape shape = layer_shape(cell, dtype, T, B, H, P, directions);
  const Precision precision = allow_tf32 ? Precision::tf32 : Precision::exact;
  const CudaPlan plan =
      plan_cuda(shape, precision, properties(gpu), backward, forced_family(kernels));
  return as_dict(shape, precision, gpu, plan, backward);
}

py::dict cuda_stack_plan(const std::string& cell, const std::string& dtype, int64_t T, int64_t B,
                         int64_t H, int64_t P, int directions, bool allow_tf32, const Gpu& gpu,
                         bool backward, const std::string& kernels, int64_t layers) {
  LayerShape shape = layer_shape(cell, dtype, T, B, H, P, directions);
  const Precision precision = allow_tf32 ? Precision::tf32 : Precision::exact;
  const StackPlan stack =
      plan_cuda_stack(shape, layers, precision, properties(gpu), backward, forced_family(kernels));
  shape.directions = stack.together;
  py::dict result;
  result["together"] = stack.together;
  result["chunk"] = stack.chunk;
  result["us"] = stack.us;
  result["us_in_turn"] = stack.us_in_turn;
  result["plan"] = as_dict(shape, precision, gpu, stack.plan, backward);
  return result;
}

}  // namespace
}  // namespace rnn_fused

PYBIND11_MODULE(_C, m) {
  m.attr("compiler") = rnn_fused::kCompiler;
  m.attr("torch_target") = RNN_FUSED_TORCH_TARGET;
  m.attr("cuda_version") = RNN_FUSED_CUDA_VERSION;
  m.attr("cuda_archs") = rnn_fused::split(RNN_FUSED_CUDA_ARCHS);
  m.attr("compiled_isas") = rnn_fused::split(RNN_FUSED_ISAS);
  m.def("supported_isas", &rnn_fused::supported_isas);
  // ValueError where RNN_FUSED_CPU_ISA names no instruction set that this machine can run.
  m.def("selected_isa", [] { return std::string(rnn_fused::isa_name(rnn_fused::selected_isa())); });
  m.def("plan_cpu", &rnn_fused::cpu_plan);
  m.def("plan_cuda", &rnn_fused::cuda_plan);
  m.def("plan_cuda_stack", &rnn_fused::cuda_stack_plan);
}
