// What the stepwise loops do between two products: one thread for each hidden unit of each sequence
// that is active. A step reads the sums of the product and W_ih x once and writes its results once;
// at the sizes that run here the launches bound it, not these bytes.
#pragma once

#include "csrc/core/cells.h"
#include "csrc/core/params.h"
#include "csrc/cuda/math.cuh"
#include "csrc/cuda/primitives.cuh"
#include "csrc/cuda/storage.cuh"

namespace rnn_fused::gpu {

constexpr int kStepThreads = 256;

// Where the rows of one timestep of one direction lie.
struct StepRows {
  int64_t row = 0, count = 0;                // of the first active sequence; active sequences
  int64_t row_before = 0, known = 0;         // in the step before, of those that were active there
  int64_t border_row = 0, border_count = 0;  // of the resets' flags
  int64_t ending = 0;                        // the first active sequence that the step after lacks
};

// What a kernel does for one timestep is described as if all B sequences were active and their rows
// the first ones. place() moves that to the rows of the timestep: on the host, or, where only the
// device knows them, first thing in the kernel.
struct Timestep {
  LayerShape shape;
  int d;
  int64_t t;

  RNN_FUSED_HD StepRows rows() const {
    const int64_t before = d == 0 ? t - 1 : t + 1, after = d == 0 ? t + 1 : t - 1;
    const int64_t border = d == 0 ? t : t + 1;
    StepRows r;
    r.row = shape.row(t);
    r.count = shape.active(t);
    if (before >= 0 && before < shape.T) {
      r.row_before = shape.row(before);
      r.known = fewer(r.count, shape.active(before));
    }
    if (shape.resets && border < shape.T) {
      r.border_row = shape.row(border);
      r.border_count = shape.active(border);
    }
    if (after >= 0 && after < shape.T) r.ending = fewer(r.count, shape.active(after));
    return r;
  }

  template <class Work>
  __device__ void place(Work& work) const {
    if (shape.sizes_on_device) work.place(rows());
  }

 private:
  RNN_FUSED_HD static int64_t fewer(int64_t a, int64_t b) { return a < b ? a : b; }
};

// The sequences, of the first `count`, that come to a step with the reset state.
struct Resets {
  const bool* flags;  // [count]
  int64_t count;      // 0 without resets

  RNN_FUSED_HD void place(const StepRows& r) {
    flags += r.border_row;
    count = r.border_count;
  }

  __device__ bool at(int64_t b) const { return b < count && flags[b]; }
};

// Rows [rows, columns] that lie in several places: sequences below `known` have their state of the
// step before in `before`, the others begin with this step and have it in `initial`; but after a
// reset it is in `reset`.
template <class T, class Initial = T>
struct Previous {
  const T* before;         // [known, stride]
  int64_t stride;          // elements
  const Initial* initial;  // [B, columns]
  int64_t columns, known;
  Resets resets;
  const Initial* reset;  // [B, columns]

  RNN_FUSED_HD void place(const StepRows& r) {
    before += r.row_before * stride;
    known = r.known;
    resets.place(r);
  }

  __device__ Acc<T> at(int64_t b, int64_t j) const {
    if (resets.at(b)) return to_acc(reset[b * columns + j]);
    return b < known ? to_acc(before[b * stride + j]) : to_acc(initial[b * columns + j]);
  }
};

// Rows of pre-activations: W_ih x, W_hh h and the biases.
template <class T>
struct PreActivations {
  using A = Acc<T>;
  int64_t count, H;            // rows
  const A* sums;               // [count, G*H] W_hh h
  const T *bias_ih, *bias_hh;  // [G*H] or null
  T* gates;                    // [count, gates_stride] W_ih x; the activated gates replace it
  int64_t gates_stride;
  CellOptions<A> options;

  __device__ A input(int64_t b, int64_t j, int gate) const {  // W_ih x + b_ih
    const A bias = bias_ih ? to_acc(bias_ih[gate * H + j]) : A(0);
    return to_acc(gates[b * gates_stride + gate * H + j]) + bias;
  }
  template <int kGates>
  __device__ A recurrent(int64_t b, int64_t j, int gate) const {  // W_hh h + b_hh
    const A bias = bias_hh ? to_acc(bias_hh[gate * H + j]) : A(0);
    return sums[(b * kGates + gate) * H + j] + bias;
  }

  __device__ LstmGates<A> lstm(int64_t b, int64_t j) const {
    const auto sum = [&](int gate) { return input(b, j, gate) + recurrent<4>(b, j, gate); };
    LstmGates<A> a = {sum(0), sum(1), sum(2), sum(3)};
    lstm_activate<Math>(a, options);
    return a;
  }
  __device__ GruGates<A> gru(int64_t b, int64_t j) const {
    GruGates<A> a = {input(b, j, 0) + recurrent<3>(b, j, 0), input(b, j, 1) + recurrent<3>(b, j, 1),
                     input(b, j, 2), recurrent<3>(b, j, 2)};
    gru_activate<Math>(a, options);
    return a;
  }

  __device__ void save(int64_t b, int64_t j, A g0, A g1, A g2, A g3) const {
    T* const to = gates + b * gates_stride + j;
    to[0] = from_acc<T>(g0);
    to[H] = from_acc<T>(g1);
    to[2 * H] = from_acc<T>(g2);
    to[3 * H] = from_acc<T>(g3);
  }
  __device__ void save(int64_t b, int64_t j, const LstmGates<A>& a) const {
    save(b, j, a.i, a.f, a.g, a.o);
  }
  __device__ void save(int64_t b, int64_t j, const GruGates<A>& a) const {
    save(b, j, a.r, a.z, a.n, a.hn);
  }
};

template <class T, Cell kCell>
__global__ void __launch_bounds__(kStepThreads) activate_rows(PreActivations<T> p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= p.count * p.H) return;
  const int64_t b = i / p.H, j = i % p.H;
  if constexpr (kCell == Cell::lstm)
    p.save(b, j, p.lstm(b, j));
  else
    p.save(b, j, p.gru(b, j));
}

// Of active sequences. An RNN's gates may be its h.
template <class T>
struct ForwardStep : PreActivations<T> {
  using A = Acc<T>;
  T* h;                // [count, h_stride]
  int64_t h_stride;    //
  bool h_has_rows;     // else it is where it is in every step
  Previous<T> h_prev;  // GRU
  A *c, *cells;        // [B, H] from step to step; [count, H] to save, or null; LSTM
  Resets resets;       //
  const T* reset_c;    // [B, H]; LSTM
  T* c_n;              // [B, H] of the sequences that end with this step; LSTM
  int64_t ending;      // the first of those
  bool save_gates;

  int64_t sequences() const { return this->count; }
  RNN_FUSED_HD void place(const StepRows& r) {
    this->count = r.count;
    this->gates += r.row * this->gates_stride;
    if (h_has_rows) h += r.row * h_stride;
    h_prev.place(r);
    if (cells) cells += r.row * this->H;
    resets = h_prev.resets;
    ending = r.ending;
  }
};

template <class T, Cell kCell>
__global__ void __launch_bounds__(kStepThreads) forward_step(ForwardStep<T> p, Timestep at) {
  using A = Acc<T>;
  at.place(p);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= p.count * p.H) return;
  const int64_t b = i / p.H, j = i % p.H;
  A h;
  if constexpr (kCell == Cell::lstm) {
    const LstmGates<A> a = p.lstm(b, j);
    const A c = p.resets.at(b) ? to_acc(p.reset_c[i]) : p.c[i];
    const LstmState<A> state = lstm_forward<Math>(a, c, p.options);
    h = state.h;
    p.c[i] = state.c;
    if (b >= p.ending) p.c_n[i] = from_acc<T>(state.c);
    if (p.cells) p.cells[i] = state.c;
    if (p.save_gates) p.save(b, j, a);
  } else if constexpr (kCell == Cell::gru) {
    const GruGates<A> a = p.gru(b, j);
    h = gru_forward(a, p.h_prev.at(b, j));
    if (p.save_gates) p.save(b, j, a);
  } else {
    const A a = p.input(b, j, 0) + p.template recurrent<1>(b, j, 0);
    h = kCell == Cell::rnn_tanh ? Math::tanh(a) : Math::relu(a);
  }
  p.h[b * p.h_stride + j] = from_acc<T>(h);
}

template <class T>
struct BackwardStep {
  using A = Acc<T>;
  int64_t count, H;       // active sequences
  const T* gates;         // [count, S*H] as saved; null for an RNN
  const A* cells;         // [count, H] as saved; LSTM
  Previous<A, T> c_prev;  // LSTM
  const T* output;        // [count, output_stride] h of this step; RNN
  int64_t output_stride;  //
  Previous<T> h_prev;     // GRU
  const A* dh;            // [count, H] what later steps leave through W_hh, or W_hr
  A* direct;              // [B, H] and through z * h, which this step overwrites; GRU
  const T* grad_output;   // [count, output_stride] or null
  const A* grad_cells;    // [count, H] or null; LSTM
  A* dc;                  // [B, H]; LSTM
  T* grad_gates;          // [count, S*H]
  T* operand;             // [count, G*H] the gradients that reach W_hh, side by side; or null
  T* hidden;              // [count, H] o * tanh(c), with a projection; or null
  CellOptions<A> options;
  int64_t saved;      // S
  int64_t first_row;  // of gates, grad_gates and hidden

  int64_t sequences() const { return count; }
  RNN_FUSED_HD void place(const StepRows& r) {
    const int64_t row_of_window = r.row - first_row;
    count = r.count;
    if (gates) gates += row_of_window * saved * H;
    if (grad_cells) grad_cells += r.row * H;
    if (cells) {
      cells += r.row * H;
      c_prev.place(r);
    }
    output += r.row * output_stride;
    h_prev.place(r);
    if (grad_output) grad_output += r.row * output_stride;
    grad_gates += row_of_window * saved * H;
    if (hidden) hidden += row_of_window * H;
  }
};

template <class T, Cell kCell>
__global__ void __launch_bounds__(kStepThreads) backward_step(BackwardStep<T> p, Timestep at) {
  using A = Acc<T>;
  at.place(p);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= p.count * p.H) return;
  const int64_t b = i / p.H, j = i % p.H;
  constexpr int kSaved = saved_count(kCell);
  const auto gate = [&](int saved) { return to_acc(p.gates[(b * kSaved + saved) * p.H + j]); };
  const auto put = [&](int saved, A grad) {
    p.grad_gates[(b * kSaved + saved) * p.H + j] = from_acc<T>(grad);
    if (kCell != Cell::gru && p.operand)
      p.operand[(b * kSaved + saved) * p.H + j] = from_acc<T>(grad);
  };
  A dh = p.dh[i];
  if (p.grad_output) dh += to_acc(p.grad_output[b * p.output_stride + j]);
  if constexpr (kCell == Cell::lstm) {
    const LstmGates<A> a = {gate(0), gate(1), gate(2), gate(3)};
    const A dc = p.dc[i] + (p.grad_cells ? p.grad_cells[i] : A(0));
    const LstmGrads<A> g = lstm_backward<Math>(a, p.cells[i], p.c_prev.at(b, j), dh, dc, p.options);
    put(0, g.gates.i);
    put(1, g.gates.f);
    put(2, g.gates.g);
    put(3, g.gates.o);
    p.dc[i] = g.c_prev;
    if (p.hidden) p.hidden[i] = from_acc<T>(g.hidden);
  } else if constexpr (kCell == Cell::gru) {
    const GruGates<A> a = {gate(0), gate(1), gate(2), gate(3)};
    const GruGrads<A> g = gru_backward(a, p.h_prev.at(b, j), dh + p.direct[i], p.options);
    put(0, g.gates.r);
    put(1, g.gates.z);
    put(2, g.gates.n);
    put(3, g.gates.hn);
    T* operand = p.operand + b * 3 * p.H + j;
    operand[0] = from_acc<T>(g.gates.r);
    operand[p.H] = from_acc<T>(g.gates.z);
    operand[2 * p.H] = from_acc<T>(g.gates.hn);
    p.direct[i] = g.h_prev;
  } else {
    const A h = to_acc(p.output[b * p.output_stride + j]);
    put(0, kCell == Cell::rnn_tanh ? dh * (1 - h * h) : Math::relu_grad(h, dh));
  }
}

template <class T>
struct CopyPrevious {
  int64_t count;  // active sequences
  Previous<T> from;
  T* out;  // [count, columns]

  int64_t sequences() const { return count; }
  RNN_FUSED_HD void place(const StepRows& r) {
    count = r.count;
    from.place(r);
  }
};

template <class T>
__global__ void __launch_bounds__(kStepThreads) copy_previous(CopyPrevious<T> p, Timestep at) {
  at.place(p);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t columns = p.from.columns;
  if (i < p.count * columns) p.out[i] = from_acc<T>(p.from.at(i / columns, i % columns));
}

// h before every row's step, where only the device knows the rows: one thread for each element of
// [T, B, P]. first: the direction's first timestep.
template <class T>
__global__ void __launch_bounds__(kStepThreads) gather_previous(CopyPrevious<T> p, Timestep first) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t columns = p.from.columns, size = p.count * columns;
  if (i >= first.shape.T * size) return;
  const StepRows rows = Timestep{first.shape, first.d, i / size}.rows();
  p.place(rows);
  const int64_t b = i % size / columns, j = i % columns;
  if (b < p.count) p.out[(rows.row + b) * columns + j] = from_acc<T>(p.from.at(b, j));
}

// data: [N, columns], whose tail becomes zero.
template <class T>
__global__ void __launch_bounds__(kStepThreads)
    zero_rows(LayerShape shape, int64_t N, int64_t columns, T* data) {
  const int64_t tail = shape.row(shape.T - 1) + shape.active(shape.T - 1);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x + tail * columns;
  if (i < N * columns) data[i] = 0;
}

// Rows of sequences 0 to B - 1 in turn, of which those with a flag become the reset state.
template <class T>
struct ResetRows {
  int64_t rows, columns, B;
  const bool* flags;  // [rows]
  const T* reset;     // [B, columns]
  T* out;             // [rows, columns]
};

template <class T>
__global__ void __launch_bounds__(kStepThreads) replace_reset_rows(ResetRows<T> p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t row = i / p.columns;
  if (row < p.rows && p.flags[row]) p.out[i] = p.reset[row % p.B * p.columns + i % p.columns];
}

// What reaches the state before a step, where that is the reset state: added to `sums`, and not
// passed on.
template <class A>
struct EndAtResets {
  Resets resets;
  int64_t columns;
  A *gradient, *more;  // [B, columns]; more may be null
  A* sums;             // [B, columns]

  int64_t sequences() const { return resets.count; }
  RNN_FUSED_HD void place(const StepRows& r) { resets.place(r); }
};

template <class A>
__global__ void __launch_bounds__(kStepThreads) end_at_resets(EndAtResets<A> p, Timestep at) {
  at.place(p);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (!p.resets.at(i / p.columns)) return;
  p.sums[i] += p.gradient[i] + (p.more ? p.more[i] : A(0));
  p.gradient[i] = 0;
  if (p.more) p.more[i] = 0;
}

// gradient = clip(gradient + more, bound), and more = 0.
template <class A>
struct ClipGradient {
  int64_t count, columns;  // of active sequences
  A bound;
  A *gradient, *more;  // [count, columns]; more may be null

  int64_t sequences() const { return count; }
  RNN_FUSED_HD void place(const StepRows& r) { count = r.count; }
};

template <class A>
__global__ void __launch_bounds__(kStepThreads) clip_gradient(ClipGradient<A> p, Timestep at) {
  at.place(p);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= p.count * p.columns) return;
  p.gradient[i] = clip(p.gradient[i] + (p.more ? p.more[i] : A(0)), p.bound);
  if (p.more) p.more[i] = 0;
}

// out = a + b, each a matrix [rows, columns] or null for zero.
template <class InA, class InB, class Out>
struct Sum {
  int64_t rows, columns;
  const InA* a;
  int64_t a_stride;
  const InB* b;
  int64_t b_stride;
  Out* out;
  int64_t out_stride;
};

template <class InA, class InB, class Out>
__device__ void add_element(const Sum<InA, InB, Out>& p, int64_t i) {
  if (i >= p.rows * p.columns) return;
  const int64_t r = i / p.columns, c = i % p.columns;
  Acc<Out> sum = 0;
  if (p.a) sum += to_acc(p.a[r * p.a_stride + c]);
  if (p.b) sum += to_acc(p.b[r * p.b_stride + c]);
  p.out[r * p.out_stride + c] = from_acc<Out>(sum);
}

template <class InA, class InB, class Out>
__global__ void __launch_bounds__(kStepThreads) add_matrices(Sum<InA, InB, Out> p) {
  add_element(p, static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x);
}

// The same of the sequences that are active in a timestep.
template <class InA, class InB, class Out>
struct StepSum {
  Sum<InA, InB, Out> sum;
  bool a_has_rows = false, b_has_rows = false, out_has_rows = false;  // as h of ForwardStep
  bool of_ending = false;  // only of the sequences that end with this step

  int64_t sequences() const { return sum.rows; }
  RNN_FUSED_HD void place(const StepRows& r) {
    const int64_t first = of_ending ? r.ending : 0;
    sum.rows = r.count - first;
    sum.a = moved(sum.a, sum.a_stride, first + (a_has_rows ? r.row : 0));
    sum.b = moved(sum.b, sum.b_stride, first + (b_has_rows ? r.row : 0));
    sum.out = moved(sum.out, sum.out_stride, first + (out_has_rows ? r.row : 0));
  }

 private:
  template <class P>
  RNN_FUSED_HD static P* moved(P* matrix, int64_t stride, int64_t rows) {
    return matrix ? matrix + rows * stride : nullptr;
  }
};

template <class InA, class InB, class Out>
__global__ void __launch_bounds__(kStepThreads) add_active(StepSum<InA, InB, Out> p, Timestep at) {
  at.place(p);
  add_element(p.sum, static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x);
}

}  // namespace rnn_fused::gpu
