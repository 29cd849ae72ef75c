#include "csrc/cuda/stepwise.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "csrc/cuda/stepwise_kernels.cuh"

namespace rnn_fused {
namespace gpu {
namespace {

template <class... Params>
void launch_for(int64_t threads, void (*kernel)(Params...), cudaStream_t stream,
                const std::type_identity_t<Params>&... params) {
  constexpr int64_t kMaxBlocks = 0x7fffffff;  // of a grid's first dimension
  const int64_t blocks = (threads + kStepThreads - 1) / kStepThreads;
  if (blocks > kMaxBlocks)
    throw std::invalid_argument("[stepwise] a kernel has at most " + std::to_string(kMaxBlocks) +
                                " blocks of " + std::to_string(kStepThreads) + " threads, got " +
                                std::to_string(blocks));
  if (blocks > 0) launch(kernel, static_cast<unsigned>(blocks), kStepThreads, 0, stream, params...);
}

template <class InA, class InB, class Out>
void add(const Sum<InA, InB, Out>& sum, cudaStream_t stream) {
  launch_for(sum.rows * sum.columns, add_matrices<InA, InB, Out>, stream, sum);
}

// Copies a matrix between storage types; null gives zeros.
template <class In, class Out>
void convert(const In* from, int64_t from_stride, Out* to, int64_t to_stride, int64_t rows,
             int64_t columns, cudaStream_t stream) {
  add(Sum<In, In, Out>{rows, columns, from, from_stride, nullptr, 0, to, to_stride}, stream);
}

// Hands out the workspace from its beginning; without one, counts its bytes.
class Carver {
 public:
  explicit Carver(void* workspace = nullptr) : base_(reinterpret_cast<uintptr_t>(workspace)) {}
  int64_t bytes() const { return static_cast<int64_t>(used_); }

  template <class T>
  T* take(int64_t count) {
    constexpr uintptr_t kAlignment = 256;
    T* taken = reinterpret_cast<T*>(base_ + used_);
    used_ += (static_cast<uintptr_t>(count) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    return taken;
  }

 private:
  uintptr_t base_, used_ = 0;
};

// Starts a kernel for one timestep, so many threads a sequence.
template <class Work>
void launch_step(void (*kernel)(Work, Timestep), std::type_identity_t<Work> work,
                 const Timestep& at, int64_t threads, cudaStream_t stream) {
  const bool on_device = at.shape.sizes_on_device;
  if (!on_device) work.place(at.rows());
  launch_for((on_device ? at.shape.B : work.sequences()) * threads, kernel, stream, work, at);
}

template <class InA, class InB, class Out>
void add(const StepSum<InA, InB, Out>& step, const Timestep& at, cudaStream_t stream) {
  launch_step(add_active<InA, InB, Out>, step, at, step.sum.columns, stream);
}

// h before a step, to be placed.
template <class T>
Previous<T> previous_h(const LayerShape& s, int64_t output_stride, const void* output,
                       const DirectionWeights& w) {
  return {static_cast<const T*>(output),
          output_stride,
          static_cast<const T*>(w.h0),
          s.P,
          0,
          {s.resets, 0},
          static_cast<const T*>(w.reset_h)};
}

template <class T, Cell kCell>
class Forward {
  using A = Acc<T>;
  static constexpr bool kLstm = kCell == Cell::lstm;
  static constexpr int kGates = gate_count(kCell);

  struct Workspace {
    A* sums = nullptr;    // [B, G*H] W_hh h
    A* c = nullptr;       // [B, H]; LSTM
    T* hidden = nullptr;  // [B, H] o * tanh(c) before the projection
    T* h = nullptr;       // [B, P] before the step; with resets, or rows that the device knows

    void take(Carver& carver, const LayerShape& s) {
      sums = carver.take<A>(s.B * kGates * s.H);
      if (kLstm) c = carver.take<A>(s.B * s.H);
      if (s.projected()) hidden = carver.take<T>(s.B * s.H);
      if (s.resets || s.sizes_on_device) h = carver.take<T>(s.B * s.P);
    }
  };

 public:
  static int64_t workspace_bytes(const LayerShape& s) {
    Carver carver;
    for (int d = 0; d < s.directions; ++d) Workspace().take(carver, s);
    return carver.bytes();
  }

  Forward(const ForwardParams& params, void* workspace, const DeviceProduct& product,
          cudaStream_t stream)
      : p_(params), product_(product), stream_(stream) {
    Carver carver(workspace);
    for (int d = 0; d < p_.directions; ++d) workspaces_[d].take(carver, p_);
  }

  void run() {
    if constexpr (kLstm)
      for (int d = 0; d < p_.directions; ++d)
        convert(static_cast<const T*>(p_.direction[d].c0), p_.H, workspaces_[d].c, p_.H, p_.B, p_.H,
                stream_);
    for (int64_t s = 0; s < p_.T; ++s)
      for (int d = 0; d < p_.directions; ++d) step(d, d == 0 ? s : p_.T - 1 - s);
  }

 private:
  // Where only the device knows a step's rows, all B sequences are multiplied, in buffers that are
  // theirs in every step, and kernels carry what belongs to the rows.
  void step(int d, int64_t t) {
    const ForwardDirection& dir = p_.direction[d];
    const Workspace& w = workspaces_[d];
    const Timestep at = {p_, d, t};
    const bool on_device = p_.sizes_on_device;
    const StepRows rows = on_device ? StepRows{.count = p_.B} : at.rows();
    const int64_t count = rows.count, known = rows.known;
    const Previous<T> h_prev = previous_h<T>(p_, p_.output_stride, dir.output, dir);
    if (on_device || rows.border_count > 0) {
      launch_step(copy_previous<T>, {count, h_prev, w.h}, at, p_.P, stream_);
      multiply_recurrent(dir, w.h, p_.P, 0, count, w.sums);
    } else {
      multiply_recurrent(dir, h_prev.before + rows.row_before * h_prev.stride, h_prev.stride, 0,
                         known, w.sums);
      multiply_recurrent(dir, h_prev.initial + known * p_.P, p_.P, known, count, w.sums);
    }

    T* const output = static_cast<T*>(dir.output);
    ForwardStep<T> step{};
    static_cast<PreActivations<T>&>(step) = {count,
                                             p_.H,
                                             w.sums,
                                             static_cast<const T*>(dir.bias_ih),
                                             static_cast<const T*>(dir.bias_hh),
                                             static_cast<T*>(dir.gates),
                                             p_.gates_stride,
                                             p_.options.template of<A>()};
    step.h = p_.projected() ? w.hidden : output;
    step.h_stride = p_.projected() ? p_.H : p_.output_stride;
    step.h_has_rows = !p_.projected();
    step.h_prev = h_prev;
    step.reset_c = static_cast<const T*>(dir.reset_c);
    step.c = w.c;
    step.cells = static_cast<A*>(dir.cells);
    step.c_n = static_cast<T*>(dir.c_n);
    step.save_gates = p_.save_gates;
    launch_step(forward_step<T, kCell>, step, at, p_.H, stream_);

    if (p_.projected()) {
      T* const h = on_device ? w.h : output + rows.row * p_.output_stride;
      const int64_t stride = on_device ? p_.P : p_.output_stride;
      product_({w.hidden, p_.dtype, count, p_.H, p_.H, 1},
               {dir.weight_hr, p_.dtype, p_.H, p_.P, 1, p_.H},
               {h, p_.dtype, count, p_.P, stride, 1});
      if (on_device)
        add(StepSum<T, T, T>{.sum = {count, p_.P, w.h, p_.P, nullptr, 0, output, p_.output_stride},
                             .out_has_rows = true},
            at, stream_);
    }
    T* const h_n = static_cast<T*>(dir.h_n);
    add(StepSum<T, T, T>{.sum = {count, p_.P, output, p_.output_stride, nullptr, 0, h_n, p_.P},
                         .a_has_rows = true,
                         .of_ending = true},
        at, stream_);
  }

  // sums[begin:end] = h @ W_hh^T
  void multiply_recurrent(const ForwardDirection& dir, const T* h, int64_t stride, int64_t begin,
                          int64_t end, A* sums) const {
    const int64_t GH = kGates * p_.H;
    product_({h, p_.dtype, end - begin, p_.P, stride, 1},
             {dir.weight_hh, p_.dtype, p_.P, GH, 1, p_.P},
             {sums + begin * GH, accumulation_type(p_.dtype), end - begin, GH, GH, 1});
  }

  const ForwardParams& p_;
  const DeviceProduct& product_;
  const cudaStream_t stream_;
  Workspace workspaces_[2];
};

template <class T, Cell kCell>
class Backward {
  using A = Acc<T>;
  static constexpr bool kLstm = kCell == Cell::lstm;
  static constexpr bool kGru = kCell == Cell::gru;
  static constexpr int kGates = gate_count(kCell);

  struct Workspace {
    A* dh = nullptr;       // [B, P] from later steps, through W_hh
    A* direct = nullptr;   // [B, H] and through z * h; GRU
    A* dc = nullptr;       // [B, H]; LSTM
    A* dhidden = nullptr;  // [B, H] of o * tanh(c), with a projection
    T* operand = nullptr;  // [B, G*H] what W_hh is multiplied with; GRU, and as the others below
    // Where only the device knows the rows of a step.
    T* total = nullptr;    // [B, P] what W_hr is multiplied with, with a projection
    A* product = nullptr;  // [B, P] what comes through W_hh

    void take(Carver& carver, const LayerShape& s) {
      dh = carver.take<A>(s.B * s.P);
      if (kGru) direct = carver.take<A>(s.B * s.H);
      if (kLstm) dc = carver.take<A>(s.B * s.H);
      if (s.projected()) dhidden = carver.take<A>(s.B * s.H);
      if (kGru || s.sizes_on_device) operand = carver.take<T>(s.B * kGates * s.H);
      if (s.projected() && s.sizes_on_device) total = carver.take<T>(s.B * s.P);
      if (s.sizes_on_device) product = carver.take<A>(s.B * s.P);
    }
  };

 public:
  static int64_t workspace_bytes(const LayerShape& s) {
    Carver carver;
    for (int d = 0; d < s.directions; ++d) Workspace().take(carver, s);
    return carver.bytes();
  }

  Backward(const BackwardParams& params, void* workspace, const DeviceProduct& product,
           cudaStream_t stream)
      : p_(params), product_(product), stream_(stream) {
    Carver carver(workspace);
    for (int d = 0; d < p_.directions; ++d) workspaces_[d].take(carver, p_);
  }

  void run() {
    const Range steps = p_.steps(0);
    for (int d = 0; d < p_.directions; ++d) begin(d);
    for (int64_t s = steps.begin; s < steps.end; ++s)
      for (int d = 0; d < p_.directions; ++d) step(d, d == 0 ? p_.T - 1 - s : s);
    for (int d = 0; d < p_.directions; ++d) end(d);
  }

 private:
  void begin(int d) {
    const BackwardDirection& dir = p_.direction[d];
    const Workspace& w = workspaces_[d];
    take(dir, dir.grad_h_n, dir.carried_dh, p_.P, w.dh);
    if constexpr (kLstm) take(dir, dir.grad_c_n, dir.carried_dc, p_.H, w.dc);
    if constexpr (kGru) fill(w.direct, 0, p_.B * p_.H * sizeof(A), stream_);
  }

  // dh or dc before the window's first step: the caller's, or what the window before left.
  void take(const BackwardDirection& dir, const void* grad_n, const void* carried, int64_t columns,
            A* gradient) const {
    if (dir.steps_before > 0)
      convert(static_cast<const A*>(carried), columns, gradient, columns, p_.B, columns, stream_);
    else
      convert(static_cast<const T*>(grad_n), columns, gradient, columns, p_.B, columns, stream_);
  }

  // And after its last one: a + b, which may be null.
  void leave(const BackwardDirection& dir, const A* a, const A* b, int64_t columns, void* grad_0,
             void* carried) const {
    if (dir.steps_after > 0)
      add(Sum<A, A, A>{p_.B, columns, a, columns, b, columns, static_cast<A*>(carried), columns},
          stream_);
    else
      add(Sum<A, A, T>{p_.B, columns, a, columns, b, columns, static_cast<T*>(grad_0), columns},
          stream_);
  }

  // Rows that only the device knows: as in the forward pass.
  void step(int d, int64_t t) {
    const BackwardDirection& dir = p_.direction[d];
    const Workspace& w = workspaces_[d];
    const Timestep at = {p_, d, t};
    const bool on_device = p_.sizes_on_device;
    const StepRows rows = on_device ? StepRows{.count = p_.B} : at.rows();
    constexpr int kSaved = saved_count(kCell);
    const int64_t count = rows.count, GH = kGates * p_.H;
    const int64_t row_of_window = rows.row - dir.first_row;
    const T* grad_output = static_cast<const T*>(dir.grad_output);

    if (p_.projected()) {  // through h = W_hr (o * tanh(c))
      T* const all = static_cast<T*>(dir.grad_projected);
      T* const grads = on_device ? all : all + row_of_window * p_.P;
      T* const total = on_device ? w.total : grads;
      add(StepSum<A, T, T>{.sum = {count, p_.P, w.dh, p_.P, grad_output, p_.output_stride, grads,
                                   p_.P},
                           .b_has_rows = true,
                           .out_has_rows = on_device},
          at, stream_);
      if (on_device)
        add(StepSum<T, T, T>{.sum = {count, p_.P, grads, p_.P, nullptr, 0, total, p_.P},
                             .a_has_rows = true},
            at, stream_);
      product_({total, p_.dtype, count, p_.P, p_.P, 1},
               {dir.weight_hr, p_.dtype, p_.P, p_.H, p_.H, 1},
               {w.dhidden, accumulation_type(p_.dtype), count, p_.H, p_.H, 1});
      grad_output = nullptr;
    }
    BackwardStep<T> step{};
    step.count = count;
    step.H = p_.H;
    step.gates = static_cast<const T*>(dir.gates);
    step.cells = static_cast<const A*>(dir.cells);
    step.h_prev = previous_h<T>(p_, p_.output_stride, dir.output, dir);
    step.c_prev = {step.cells,
                   p_.H,
                   static_cast<const T*>(dir.c0),
                   p_.H,
                   0,
                   step.h_prev.resets,
                   static_cast<const T*>(dir.reset_c)};
    step.output = static_cast<const T*>(dir.output);
    step.output_stride = p_.output_stride;
    step.dh = p_.projected() ? w.dhidden : w.dh;
    step.direct = w.direct;
    step.grad_output = grad_output;
    step.grad_cells = static_cast<const A*>(dir.grad_cells);
    step.dc = w.dc;
    step.options = p_.options.template of<A>();
    step.grad_gates = static_cast<T*>(dir.grad_gates);
    step.operand = w.operand;
    step.hidden = p_.projected() ? static_cast<T*>(dir.hidden) : nullptr;
    step.saved = kSaved;
    step.first_row = dir.first_row;
    launch_step(backward_step<T, kCell>, step, at, p_.H, stream_);

    const T* const operand = w.operand ? w.operand : step.grad_gates + row_of_window * GH;
    A* const product = on_device ? w.product : w.dh;
    product_({operand, p_.dtype, count, GH, GH, 1}, {dir.weight_hh, p_.dtype, GH, p_.P, p_.P, 1},
             {product, accumulation_type(p_.dtype), count, p_.P, p_.P, 1});
    if (on_device)  // dh of the other sequences waits for their own steps
      add(StepSum<A, A, A>{.sum = {count, p_.P, product, p_.P, nullptr, 0, w.dh, p_.P}}, at,
          stream_);
    if (const A bound = p_.options.template of<A>().grad_clip; bound > 0)
      launch_step(clip_gradient<A>, {count, p_.P, bound, w.dh, w.direct}, at, p_.P, stream_);
    if (p_.resets) {
      end_at_resets_of(at, p_.P, w.dh, w.direct, dir.grad_reset_h);
      if constexpr (kLstm) end_at_resets_of(at, p_.H, w.dc, nullptr, dir.grad_reset_c);
    }
  }

  void end_at_resets_of(const Timestep& at, int64_t columns, A* gradient, A* more,
                        void* sums) const {
    launch_step(end_at_resets<A>, {{p_.resets, 0}, columns, gradient, more, static_cast<A*>(sums)},
                at, columns, stream_);
  }

  void end(int d) {
    const BackwardDirection& dir = p_.direction[d];
    const Workspace& w = workspaces_[d];
    leave(dir, w.dh, w.direct, p_.P, dir.grad_h0, dir.carried_dh);
    if constexpr (kLstm) leave(dir, w.dc, nullptr, p_.H, dir.grad_c0, dir.carried_dc);
  }

  const BackwardParams& p_;
  const DeviceProduct& product_;
  const cudaStream_t stream_;
  Workspace workspaces_[2];
};

template <class T>
void gather(const BackwardParams& p, int d, T* out, cudaStream_t stream) {
  const BackwardDirection& dir = p.direction[d];
  const Previous<T> h = previous_h<T>(p, p.output_stride, dir.output, dir);
  if (p.sizes_on_device)
    return launch_for(p.T * p.B * p.P, gather_previous<T>, stream, {p.B, h, out}, {p, d, 0});
  const auto [begin, end] = p.timesteps(d);
  const auto copy = [&](const T* from, int64_t stride, int64_t row, int64_t rows) {
    convert(from, stride, out + (row - dir.first_row) * p.P, p.P, rows, p.P, stream);
  };
  for (int64_t t = begin; t < end; ++t) {
    const StepRows r = Timestep{p, d, t}.rows();
    copy(h.initial + r.known * p.P, p.P, r.row + r.known, r.count - r.known);
    if (p.batch_sizes) copy(h.before + r.row_before * h.stride, h.stride, r.row, r.known);
  }
  // Dense, all steps but the direction's first lie as far from their predecessors.
  const Range later = {std::max<int64_t>(begin, d == 0), std::min(end, p.T - d)};
  if (!p.batch_sizes && later.begin < later.end)
    copy(h.before + (later.begin - 1 + 2 * d) * p.B * h.stride, h.stride, later.begin * p.B,
         (later.end - later.begin) * p.B);
  if (!p.resets) return;
  const auto replace = [&](int64_t row, int64_t border_row, int64_t rows) {
    launch_for(rows * p.P, replace_reset_rows<T>, stream,
               ResetRows<T>{rows, p.P, p.B, p.resets + border_row,
                            static_cast<const T*>(dir.reset_h), out + (row - dir.first_row) * p.P});
  };
  // Dense, the borders of all steps lie as far from their rows; ragged, each step has its own.
  if (!p.batch_sizes)
    return replace(begin * p.B, (begin + d) * p.B, (std::min(end, p.T - d) - begin) * p.B);
  for (int64_t t = begin; t < end; ++t) {
    const StepRows r = Timestep{p, d, t}.rows();
    replace(r.row, r.border_row, r.border_count);
  }
}

template <class T, Cell kCell>
void activate(const LayerShape& s, const DirectionWeights& w, int64_t rows, const void* sums,
              void* gates, cudaStream_t stream) {
  using A = Acc<T>;
  launch_for(rows * s.H, activate_rows<T, kCell>, stream,
             PreActivations<T>{rows, s.H, static_cast<const A*>(sums),
                               static_cast<const T*>(w.bias_ih), static_cast<const T*>(w.bias_hh),
                               static_cast<T*>(gates), 4 * s.H, s.options.of<A>()});
}

// Calls body with the loop's class for a cell and a dtype.
template <template <class, Cell> class Loop, class Body>
void with_loop(const LayerShape& shape, const Body& body) {
  with_type(shape.dtype, [&](auto storage) {
    with_cell(shape.cell, [&](auto cell) {
      body(std::type_identity<Loop<decltype(storage), decltype(cell)::value>>());
    });
  });
}

template <template <class, Cell> class Loop>
int64_t workspace_bytes(const LayerShape& shape) {
  int64_t bytes = 0;
  with_loop<Loop>(shape, [&](auto loop) { bytes = decltype(loop)::type::workspace_bytes(shape); });
  return bytes;
}

template <template <class, Cell> class Loop, class Params>
void run(const Params& params, void* workspace, const DeviceProduct& product, cudaStream_t stream) {
  with_loop<Loop>(params, [&](auto loop) {
    typename decltype(loop)::type(params, workspace, product, stream).run();
  });
}

}  // namespace
}  // namespace gpu

int64_t stepwise_forward_workspace(const LayerShape& shape) {
  return gpu::workspace_bytes<gpu::Forward>(shape);
}

void stepwise_forward(const ForwardParams& params, void* workspace, const DeviceProduct& product,
                      cudaStream_t stream) {
  gpu::run<gpu::Forward>(params, workspace, product, stream);
}

int64_t stepwise_backward_workspace(const LayerShape& shape) {
  return gpu::workspace_bytes<gpu::Backward>(shape);
}

void stepwise_backward(const BackwardParams& params, void* workspace, const DeviceProduct& product,
                       cudaStream_t stream) {
  gpu::run<gpu::Backward>(params, workspace, product, stream);
}

void activate_gates(const LayerShape& shape, const DirectionWeights& weights, int64_t rows,
                    const void* sums, void* gates, cudaStream_t stream) {
  gpu::with_type(shape.dtype, [&](auto storage) {
    const auto run = shape.cell == Cell::gru ? gpu::activate<decltype(storage), Cell::gru>
                                             : gpu::activate<decltype(storage), Cell::lstm>;
    run(shape, weights, rows, sums, gates, stream);
  });
}

void add_to_sums(DType dtype, int64_t count, const void* more, void* sums, cudaStream_t stream) {
  gpu::with_type(dtype, [&](auto storage) {
    using A = gpu::Acc<decltype(storage)>;
    A* const to = static_cast<A*>(sums);
    gpu::add(gpu::Sum<A, A, A>{1, count, to, 0, static_cast<const A*>(more), 0, to, 0}, stream);
  });
}

void gather_previous_h(const BackwardParams& params, int direction, void* out,
                       cudaStream_t stream) {
  gpu::with_type(params.dtype, [&](auto storage) {
    gpu::gather(params, direction, static_cast<decltype(storage)*>(out), stream);
  });
}

void zero_tail(const LayerShape& shape, int64_t N, int64_t row_bytes, void* data,
               cudaStream_t stream) {
  const int64_t columns = row_bytes / static_cast<int64_t>(sizeof(uint16_t));
  gpu::launch_for(N * columns, gpu::zero_rows<uint16_t>, stream, shape, N, columns,
                  static_cast<uint16_t*>(data));
}

}  // namespace rnn_fused
