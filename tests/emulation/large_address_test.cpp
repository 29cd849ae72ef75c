// Tensors beyond 2^31 elements, by address arithmetic: the bits of a layer whose rows lie far apart
// are those of the same layer without the gaps, and a thread beyond 2^32 has the bits of the first.
#include <doctest/doctest.h>

#include <memory>
#include <vector>

#include "csrc/cuda/persistent.h"
#include "csrc/cuda/stepwise_kernels.cuh"
#include "tests/cpp/check.h"
#include "tests/cpp/spread.h"
#include "tests/emulation/device_product.h"
#include "tests/emulation/runtime.h"

namespace rnn_fused {
namespace {

constexpr GpuProperties kH100 = {90, 132, 65536, 233472, 232448};

// `forward` and `backward` are given the params.
template <class ForwardPass, class BackwardPass>
void check_spread(const Sizes& sizes, const Spread& spread, uint64_t seed,
                  const ForwardPass& forward, const BackwardPass& backward) {
  CAPTURE(sizes);
  const Layer l(sizes, seed);
  const Products products(l, l.dtype);
  const FarLayer far(l, spread);
  const Upstream upstream(l, seed);
  const Forward saved = run_forward(l, true, products.direction, forward);
  CHECK(far.run_forward(true, products.direction, forward) == saved);
  CHECK(far.run_backward(saved, upstream, backward) == run_backward(l, saved, upstream, backward));
}

void stepwise_passes(const Sizes& sizes, const Spread& spread, uint64_t seed) {
  check_spread(
      sizes, spread, seed,
      [](const ForwardParams& params) {
        DeviceWorkspace workspace(stepwise_forward_workspace(params));
        stepwise_forward(params, workspace.get(), kProduct, nullptr);
      },
      [](const BackwardParams& params) {
        DeviceWorkspace workspace(stepwise_backward_workspace(params));
        stepwise_backward(params, workspace.get(), kProduct, nullptr);
      });
}

TEST_CASE("stepwise: timesteps beyond 2^31 rows, and rows 2^31 elements apart") {
  uint64_t seed = 0;
  for (const Spread& spread : {kFarTimesteps, kFarRows})
    for (DType dtype : {DType::f32, DType::bf16})
      for (Cell cell : kCells)
        for (int directions : {1, 2}) {
          Sizes s{cell, dtype, 3, 2, 1, 3};
          s.P = cell == Cell::lstm && directions == 2 ? 2 : 0;
          s.directions = directions;
          s.resets = directions == 2;
          s.ragged = spread.rows != 0;
          stepwise_passes(s, spread, ++seed);
        }
}

TEST_CASE("persistent: timesteps beyond 2^31 rows, and rows 2^31 elements apart") {
  uint64_t seed = 0;
  for (const Spread& spread : {kFarTimesteps, kFarRows})
    for (const auto& [dtype, precision] : {std::pair{DType::bf16, Precision::exact},
                                           {DType::f32, Precision::exact},
                                           {DType::f32, Precision::tf32}})
      for (Cell cell : {Cell::lstm, Cell::gru, Cell::rnn_tanh}) {
        Sizes s{cell, dtype, 3, 2, 1, seed % 2 ? 9 : 8};
        s.gap = 8;
        s.directions = seed % 4 < 2 ? 1 : 2;
        s.resets = seed % 3 == 0;
        s.ragged = spread.rows != 0;
        check_spread(
            s, spread, ++seed,
            [&](const ForwardParams& params) {
              const CudaPlan plan = plan_cuda(params, precision, kH100, false);
              DeviceWorkspace workspace(persistent_workspace(plan, params, false));
              persistent_forward(plan, precision, params, workspace.get(), nullptr);
            },
            [&](const BackwardParams& params) {
              const CudaPlan plan = plan_cuda(params, precision, kH100, true);
              DeviceWorkspace workspace(persistent_workspace(plan, params, true));
              persistent_backward(plan, precision, params, workspace.get(), nullptr);
            });
      }
}

TEST_CASE("h before each step is gathered from timesteps beyond 2^31 rows") {
  for (int d : {0, 1}) {
    Sizes s{Cell::gru, DType::f32, 4, 3, 1, 3};
    s.directions = 2;
    s.ragged = s.resets = true;
    const Layer l(s, 1);
    const FarLayer far(l, kFarTimesteps);
    const Upstream output(l, 2);
    BackwardParams params{l.shape(), {}, l.output_stride()};
    static_cast<DirectionWeights&>(params.direction[d]) = l.weights(d);
    params.direction[d].output = output.output.at(d * l.P);
    Array near(l.dtype, l.N * l.P), gathered(l.dtype, l.N * l.P);
    gather_previous_h(params, d, near.at(0), nullptr);

    const FarTensor far_output = far.copy(output.output, l.output_stride(), l.output_stride());
    const FarTensor far_gathered = far.tensor(near, l.dtype, l.P, l.P);
    static_cast<LayerShape&>(params) = far.shape();
    params.direction[d].output = far_output.at(d * l.P);
    gather_previous_h(params, d, far_gathered.at(0), nullptr);
    far_gathered.gather(gathered.at(0));
    CHECK(gathered == near);
  }
}

// ---------------------------------------------------------------------------------------------
// One thread of a launch of more than 2^32
// ---------------------------------------------------------------------------------------------

constexpr int64_t kH = 3, kUnit = 1;
constexpr int64_t kSequence = (int64_t{1} << 31) + 1;  // of so many and one

// A tensor [kSequence + 1, columns] of which the last row exists, and a tensor of that row alone.
template <class E>
class LastRow {
 public:
  LastRow(int64_t columns, Random& random)
      : columns_(columns), space_((kSequence + 1) * bytes()), near_(new E[columns]) {
    for (int64_t j = 0; j < columns; ++j) near_[j] = static_cast<E>(random.uniform(0.1, 0.9));
    std::memcpy(row(), near_.get(), bytes());
  }

  E* get(bool far) { return far ? reinterpret_cast<E*>(space_.at(0)) : near_.get(); }
  bool same() const { return std::memcmp(row(), near_.get(), bytes()) == 0; }

 private:
  int64_t bytes() const { return columns_ * static_cast<int64_t>(sizeof(E)); }
  void* row() const { return space_.at(kSequence * bytes()); }

  const int64_t columns_;
  AddressSpace space_;
  std::unique_ptr<E[]> near_;
};

// Runs the kernel as the thread of element (b, j) of a matrix with so many columns.
template <class... Params>
void run_thread(void (*kernel)(Params...), int64_t b, int64_t columns, int64_t j,
                const std::type_identity_t<Params>&... params) {
  const int64_t i = b * columns + j;
  blockDim = dim3(gpu::kStepThreads);
  blockIdx = {static_cast<unsigned>(i / gpu::kStepThreads), 0, 0};
  threadIdx = {static_cast<unsigned>(i % gpu::kStepThreads), 0, 0};
  kernel(params...);
}

template <Cell kCell>
void check_step_kernels(bool reset) {
  constexpr int64_t G = gate_count(kCell), S = saved_count(kCell);
  Random random(reset + 1);
  std::vector<float> bias(G * kH, 0.1f);
  LastRow<float> sums(G * kH, random), gates(S * kH, random), h(kH, random), before(kH, random),
      initial(kH, random), c(kH, random), cells(kH, random), c_n(kH, random), dh(kH, random),
      direct(kH, random), dc(kH, random), grads(S * kH, random), operand(G * kH, random),
      hidden(kH, random), gradient(kH, random);
  LastRow<bool> flags(1, random);
  for (bool far : {false, true}) {
    const int64_t b = far ? kSequence : 0;
    *(flags.get(far) + b) = reset;
    const gpu::Resets resets = {flags.get(far), b + 1};
    const auto previous = [&](LastRow<float>& tensor) {
      return gpu::Previous<float>{tensor.get(far), kH,     initial.get(far), kH,
                                  b + 1,           resets, initial.get(far)};
    };
    gpu::ForwardStep<float> forward{};
    forward.count = b + 1;
    forward.H = kH;
    forward.sums = sums.get(far);
    forward.bias_ih = forward.bias_hh = bias.data();
    forward.gates = gates.get(far);
    forward.gates_stride = S * kH;
    forward.h = h.get(far);
    forward.h_stride = kH;
    forward.h_prev = previous(before);
    forward.c = c.get(far);
    forward.cells = cells.get(far);
    forward.resets = resets;
    forward.reset_c = initial.get(far);
    forward.c_n = c_n.get(far);
    forward.ending = b;
    forward.save_gates = true;
    run_thread(gpu::forward_step<float, kCell>, b, kH, kUnit, forward, {});

    gpu::BackwardStep<float> backward{};
    backward.count = b + 1;
    backward.H = kH;
    backward.gates = gates.get(far);
    backward.cells = cells.get(far);
    backward.c_prev = previous(before);
    backward.output = h.get(far);
    backward.output_stride = kH;
    backward.h_prev = previous(before);
    backward.dh = dh.get(far);
    backward.direct = direct.get(far);
    backward.grad_output = gradient.get(far);
    backward.dc = dc.get(far);
    backward.grad_gates = grads.get(far);
    backward.operand = operand.get(far);
    backward.hidden = hidden.get(far);
    run_thread(gpu::backward_step<float, kCell>, b, kH, kUnit, backward, {});
  }
  for (const LastRow<float>* tensor :
       {&gates, &h, &c, &cells, &c_n, &direct, &dc, &grads, &operand, &hidden})
    CHECK(tensor->same());
}

TEST_CASE("stepwise: a thread beyond 2^32 finds its elements") {
  for (bool reset : {false, true}) {
    check_step_kernels<Cell::lstm>(reset);
    check_step_kernels<Cell::gru>(reset);
    check_step_kernels<Cell::rnn_tanh>(reset);
    check_step_kernels<Cell::rnn_relu>(reset);
  }
  Random random(3);
  LastRow<float> a(kH, random), b(kH, random), sum(kH, random), copy(kH, random), reset(kH, random),
      replaced(kH, random), gradient(kH, random), more(kH, random), sums(kH, random),
      clipped(kH, random);
  LastRow<bool> flags(1, random);
  for (bool far : {false, true}) {
    const int64_t row = far ? kSequence : 0;
    *(flags.get(far) + row) = true;
    const gpu::Resets resets = {flags.get(far), row + 1};
    run_thread(gpu::add_matrices<float, float, float>, row, kH, kUnit,
               {row + 1, kH, a.get(far), kH, b.get(far), kH, sum.get(far), kH});
    run_thread(gpu::replace_reset_rows<float>, row, kH, kUnit,
               {row + 1, kH, row + 1, flags.get(far), reset.get(far), replaced.get(far)});
    run_thread(gpu::end_at_resets<float>, row, kH, kUnit,
               {resets, kH, gradient.get(far), more.get(far), sums.get(far)}, {});
    run_thread(gpu::clip_gradient<float>, row, kH, kUnit,
               {row + 1, kH, 0.1f, clipped.get(far), more.get(far)}, {});
    const gpu::Previous<float> from = {a.get(far), kH,           b.get(far), kH,
                                       row + 1,    {nullptr, 0}, nullptr};
    run_thread(gpu::copy_previous<float>, row, kH, kUnit, {row + 1, from, copy.get(far)}, {});
  }
  for (const LastRow<float>* tensor : {&sum, &copy, &replaced, &gradient, &more, &sums, &clipped})
    CHECK(tensor->same());
}

// More than any memory holds: the number of blocks would wrap around.
TEST_CASE("stepwise: a launch of more blocks than a grid has is an error") {
  const LayerShape shape = {Cell::lstm, DType::f32, 1,      (int64_t{1} << 32) + 1, 256, 256,
                            1,          nullptr,    nullptr};
  ForwardParams params{};
  static_cast<LayerShape&>(params) = shape;
  CHECK_THROWS_WITH(
      stepwise_forward(params, nullptr, kProduct, nullptr),
      "[stepwise] a kernel has at most 2147483647 blocks of 256 threads, got 4294967297");
}

}  // namespace
}  // namespace rnn_fused
