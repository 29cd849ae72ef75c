// What one call of a recurrent layer needs, without torch: sizes, pointers and their shapes.
//
// Axes: T timesteps, B sequences, N rows (one row = one sequence at one timestep), I input size,
// H hidden size, P size of h (H, or the projection's), G gates (LSTM 4, GRU 3, RNN 1),
// S saved values per unit (LSTM and GRU 4, RNN 1), D directions (1 or 2).
//
// Rows are ordered by time. Dense: row(t, b) = t * B + b. Ragged (a PackedSequence): the sequences
// are sorted by decreasing length, timestep t holds the first batch_sizes[t] of them, and row(t, b)
// = row_start[t] + b. The reverse direction walks t downwards over the same rows, so a sequence
// joins at its own end. The last sequences may have no timestep, the last timesteps no sequence,
// and behind the rows of all timesteps there may be others: the tail, which the loops leave alone.
//
// Padded: a ragged batch whose input, output and gradients of these are [T, B, ...] and, like its
// states, in the caller's order of sequences. Rows elsewhere are packed. On the CPU only.
#pragma once

#include <cstdint>
#include <limits>

#include "csrc/core/host_device.h"

namespace rnn_fused {

enum class Cell { lstm, gru, rnn_tanh, rnn_relu };

// Storage type. Maths and accumulation happen in float for the 16-bit types.
enum class DType { f32, f64, bf16, f16 };

struct Range {
  int64_t begin, end;
};

RNN_FUSED_HD constexpr int gate_count(Cell cell) {
  return cell == Cell::lstm ? 4 : cell == Cell::gru ? 3 : 1;
}

// Values kept per unit and row for the backward pass: the GRU adds hn = W_hn h + b_hn to its gates.
RNN_FUSED_HD constexpr int saved_count(Cell cell) {
  return cell == Cell::gru ? 4 : gate_count(cell);
}

// What a cell does besides its equations, in the type of its maths. The values here change nothing:
// no comparison with NaN, for a bound, is true.
template <class A>
struct CellOptions {
  A gate_slope = 1;                                   // gates are sigmoid(gate_slope * x)
  A cell_clip = std::numeric_limits<A>::quiet_NaN();  // |c| is at most this
  A grad_clip = std::numeric_limits<A>::quiet_NaN();  // and each |dh|, |dc| that leaves a step
};

// The same twice, so that no kernel converts them.
struct Options {
  CellOptions<float> f32 = {};
  CellOptions<double> f64 = {};

  template <class A>
  RNN_FUSED_HD const CellOptions<A>& of() const {
    if constexpr (sizeof(A) == sizeof(double))
      return f64;
    else
      return f32;
  }
};

// float32 products may be those of two bfloat16 terms of each factor, x = high + low up to 2^-17 of
// it: `split` in what follows. Where can_split of the CPU's plan.h, not with weights that were
// packed before, and taken as exact where that is no slower (split32.h).

// A layer has one direction or two. On CUDA up to four layers of a stack, which have one each, may
// run side by side as if they were directions of one layer.
constexpr int kMaxDirections = 4;

struct LayerShape {
  Cell cell;
  DType dtype;
  int64_t T, B, H, P;
  int directions;
  const int64_t* batch_sizes;  // [T] non-increasing, at most B, or null: B at every timestep
  const int64_t* row_start;    // [T], or null: t * B
  // [N] or null: whether the row's sequence has its state reset between the timestep before and the
  // row's own; at its first, whether the forward direction begins with the reset state.
  const bool* resets = nullptr;
  Options options = {};
  bool sizes_on_device = false;    // batch_sizes and row_start are known to a CUDA device alone
  const int64_t* order = nullptr;  // [B], padded: which the caller's sequence b is; else null
  bool split = false;
  bool stacked = false;  // the directions are layers of a stack, which all walk forwards

  // Whether direction d walks backwards through time.
  RNN_FUSED_HD bool reverse(int d) const { return d == 1 && !stacked; }

  // Sequences that reach timestep t, and the row of the first.
  RNN_FUSED_HD int64_t active(int64_t t) const { return batch_sizes ? batch_sizes[t] : B; }
  RNN_FUSED_HD int64_t row(int64_t t) const { return row_start ? row_start[t] : t * B; }
  RNN_FUSED_HD bool projected() const { return P != H; }

  // Sequence b, and its row at timestep t, in the caller's tensors.
  RNN_FUSED_HD int64_t sequence(int64_t b) const { return order ? order[b] : b; }
  RNN_FUSED_HD int64_t place(int64_t t, int64_t b) const {
    return order ? t * B + order[b] : row(t) + b;
  }

  // Whether sequence b has a reset between timesteps t - 1 and t.
  RNN_FUSED_HD bool resets_at(int64_t t, int64_t b) const {
    return resets && t < T && b < active(t) && resets[row(t) + b];
  }
  // Whether direction d comes to timestep t with the reset state, and leaves it so. The forward
  // direction crosses the border of timestep t before it, the reverse one after it.
  RNN_FUSED_HD bool enters_reset(int d, int64_t t, int64_t b) const {
    return resets_at(d == 0 ? t : t + 1, b);
  }
  RNN_FUSED_HD bool leaves_reset(int d, int64_t t, int64_t b) const {
    return d == 0 ? resets_at(t + 1, b) : t > 0 && resets_at(t, b);
  }
};

// Weights of one direction. "any" pointers have the layer's dtype.
struct DirectionWeights {
  const void* weight_hh;  // [G*H, P]
  const void* weight_hr;  // [P, H]; null without a projection
  const void* bias_ih;    // [G*H] or null
  const void* bias_hh;    // [G*H] or null
  const void* h0;         // [B, P]
  const void* c0;         // [B, H]; LSTM only, else null
  // The state after a reset; null without resets.
  const void* reset_h = nullptr;  // [B, P]
  const void* reset_c = nullptr;  // [B, H]; LSTM only
};

struct ForwardDirection : DirectionWeights {
  const void* weight_ih;  // [G*H, I]
  // [N, gates_stride] or null. With input_in_gates it holds W_ih x on entry, [N, G*H], and may
  // alias output for an RNN. With save_gates the activated gates are left in it: LSTM (i, f, g, o),
  // GRU (r, z, n, hn).
  void* gates;
  void* cells;   // [N, H] c of every row in the accumulation type, or null; LSTM only
  void* output;  // [N, output_stride], this direction's first column
  void* h_n;     // [B, P]
  void* c_n;     // [B, H]; LSTM only
  // The weights and biases as cpu_pack_weights left them, or null. On the CPU only.
  const void* packed = nullptr;
  // In the persistent kernels on CUDA only: a window of the loop's steps, where other calls make
  // the others, an even number of them before. h_n and c_n are then those behind the window, and h0
  // of the next window may be h_n.
  int64_t steps_before = 0, steps_after = 0;
  int64_t first_row = 0;  // whose gates come first
  // c in the accumulation type, from the window before and to the window after this one.
  void* carried_c = nullptr;  // [B, H]; LSTM only
};

struct ForwardParams : LayerShape {
  ForwardDirection direction[kMaxDirections];
  const void* input;  // [N, I]
  int64_t I;
  bool input_in_gates;    // the caller multiplied W_ih x
  int64_t gates_stride;   // elements between rows of gates
  int64_t output_stride;  // elements between rows of output
  bool save_gates;
};

// M: the rows of the loop's window, see BackwardParams.
struct BackwardDirection : DirectionWeights {
  // [M, S*H] as saved; null for an RNN. May be grad_gates, whose rows it then leaves one by one.
  const void* gates;
  const void* cells;        // [N, H] as saved; LSTM only
  const void* output;       // [N, output_stride]
  const void* grad_output;  // [N, output_stride] or null for zero
  const void* grad_h_n;     // [B, P] or null for zero
  const void* grad_c_n;     // [B, H] or null for zero
  const void* grad_cells;   // [N, H] in the accumulation type, or null for zero; LSTM only
  // Gradients of the pre-activations, [M, S*H]: LSTM (i, f, g, o), GRU (r, z, n, hn), RNN (a).
  void* grad_gates;
  // With a projection only: what dW_hr = grad_projected^T hidden needs.
  void* grad_projected;  // [M, P] total gradient of h
  void* hidden;          // [M, H] o * tanh(c), recomputed
  // Written by the last window.
  void* grad_h0;  // [B, P]
  void* grad_c0;  // [B, H]; LSTM only
  // In the accumulation type, and added to; null without resets.
  void* grad_reset_h = nullptr;  // [B, P]
  void* grad_reset_c = nullptr;  // [B, H]; LSTM only
  int64_t first_row = 0;         // the first of the M rows
  // Steps that other calls make; 0: the window is everything. Those of a layer's directions alike.
  int64_t steps_before = 0, steps_after = 0;
  // dh and dc in the accumulation type, from the window before and to the window after this one.
  void* carried_dh = nullptr;  // [B, P]
  void* carried_dc = nullptr;  // [B, H]; LSTM only
};

// A call runs a window of the loop's steps; step s undoes the last step but s of the forward pass.
// The steps of a window may have their gates, and the gradients of these, in memory of their own.
struct BackwardParams : LayerShape {
  BackwardDirection direction[kMaxDirections];
  int64_t output_stride;  // elements between rows of output and grad_output

  RNN_FUSED_HD Range steps(int d) const {
    return {direction[d].steps_before, T - direction[d].steps_after};
  }
  RNN_FUSED_HD Range timesteps(int d) const {
    const Range s = steps(d);
    return reverse(d) ? s : Range{T - s.end, T - s.begin};
  }
};

// The weights of one direction, to be rearranged once for many forward passes.
struct PackParams {
  Cell cell;
  DType dtype;
  int64_t I, H, P;
  const void *weight_ih, *weight_hh, *weight_hr, *bias_ih, *bias_hh;  // as in ForwardDirection
};

// The activated gates of some rows of one direction of an LSTM or GRU, from the h's of its forward
// pass. N at least 1.
struct GatesParams {
  Cell cell;
  DType dtype;
  Options options;
  int64_t N, I, H, P;
  const void* const* input;   // N pointers to rows of I
  const void* const* h_prev;  // N pointers to rows of P: h before each row's step
  const void *weight_ih, *weight_hh, *bias_ih, *bias_hh;  // as in ForwardDirection
  void* gates;                                            // [N, S*H]
  bool pack = true;  // rearrange the weights, as the forward pass did: it decides the order of sums
  bool split = false;
};

// dx = sum over directions of grad_gates[:, :K] @ weight_ih. N at least 1.
struct InputGradientParams {
  DType dtype;
  int directions;
  int64_t N, K, I;
  int64_t stride;             // elements between rows of grad_gates
  const void* grad_gates[2];  // [N, stride]
  const void* weight_ih[2];   // [K, I]
  void* grad_input;           // rows of I
  const int64_t* place;       // [N] which of them
  bool accumulate = false;    // add to what is there
  bool split = false;
};

// right[i].out = left.T @ right[i], the gradients of one or two weights, and where asked for the
// sums of left's rows, the gradients of biases. N at least 1.
struct OuterProductParams {
  struct Right {
    const void* const* row;  // N pointers to rows of `columns`
    int64_t columns;         // 0 where there is no second one
    void* out;               // [rows, columns]
  };

  DType dtype;
  int64_t N, rows;
  const void* left;  // [N, left_stride], of which the first `rows` columns count
  int64_t left_stride;
  Right right[2];
  void* sums[2];            // [rows] or null; the second only with the first
  bool accumulate = false;  // out and sums have the accumulation type, and are added to
  bool split = false;
};

}  // namespace rnn_fused
