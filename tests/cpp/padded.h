// The same call with its sequences in a padded batch, in another order: what the kernels then write
// is brought into the order of the packed one, whose bits it must have.
#pragma once

#include <doctest/doctest.h>

#include "tests/cpp/layer.h"

namespace rnn_fused {

class Padded {
 public:
  explicit Padded(const Layer& l) : l_(l), order_(l.B) {
    // Where sequence b stands.
    for (int64_t b = 0; b < l.B; ++b) order_[b] = l.B - 1 - b;
    std::rotate(order_.begin(), order_.begin() + l.B / 3, order_.end());
  }

  Forward run_forward(Isa isa, const Host& host, bool save) const {
    return rnn_fused::run_forward(l_, save, nullptr, [&](ForwardParams p) {
      const ForwardParams packed = p;
      const Array input = pad(p.input, l_.I);
      p.order = order_.data();
      p.input = input.at(0);
      Array output = padding(l_.output_stride()), h_n[2], c_n[2];
      States states[2];
      for (int d = 0; d < l_.directions; ++d) {
        ForwardDirection& dir = p.direction[d];
        states[d].sort(*this, dir);
        h_n[d] = Array(l_.dtype, l_.B * l_.P);
        c_n[d] = Array(l_.dtype, l_.lstm() ? l_.B * l_.H : 0);
        dir.output = output.at(d * l_.P);
        dir.h_n = h_n[d].at(0);
        dir.c_n = c_n[d].at(0);
      }
      cpu_forward(isa, p, host);
      pack(output, l_.output_stride(), packed.direction[0].output);
      for (int d = 0; d < l_.directions; ++d) {
        unsort(h_n[d], l_.P, packed.direction[d].h_n);
        unsort(c_n[d], l_.H, packed.direction[d].c_n);
      }
    });
  }

  // In windows of so many steps.
  Backward run_backward(Isa isa, const Host& host, const Forward& forward, const Upstream& upstream,
                        int64_t steps) const {
    const auto run = [&](BackwardParams p) {
      const BackwardParams packed = p;
      p.order = order_.data();
      const Array output = pad(p.direction[0].output, l_.output_stride());
      const Array grad_output = pad(p.direction[0].grad_output, l_.output_stride());
      States states[2];
      Array grad_h_n[2], grad_c_n[2], grad_h0[2], grad_c0[2], reset_h[2], reset_c[2];
      for (int d = 0; d < l_.directions; ++d) {
        BackwardDirection& dir = p.direction[d];
        states[d].sort(*this, dir);
        dir.output = output.at(d * l_.P);
        dir.grad_output = grad_output.at(d * l_.P);
        dir.grad_h_n = (grad_h_n[d] = sort(dir.grad_h_n, l_.P, l_.dtype)).at(0);
        dir.grad_c_n = (grad_c_n[d] = sort(dir.grad_c_n, l_.H, l_.dtype)).at(0);
        dir.grad_h0 = (grad_h0[d] = sort(dir.grad_h0, l_.P, l_.dtype)).at(0);
        dir.grad_c0 = (grad_c0[d] = sort(dir.grad_c0, l_.H, l_.dtype)).at(0);
        const DType sums = accumulation(l_.dtype);
        dir.grad_reset_h = (reset_h[d] = sort(dir.grad_reset_h, l_.P, sums)).at(0);
        dir.grad_reset_c = (reset_c[d] = sort(dir.grad_reset_c, l_.H, sums)).at(0);
      }
      cpu_backward(isa, p, host);
      for (int d = 0; d < l_.directions; ++d) {
        const BackwardDirection& dir = packed.direction[d];
        unsort(grad_h0[d], l_.P, dir.grad_h0);
        unsort(grad_c0[d], l_.H, dir.grad_c0);
        unsort(reset_h[d], l_.P, dir.grad_reset_h);
        unsort(reset_c[d], l_.H, dir.grad_reset_c);
      }
    };
    return rnn_fused::run_backward(l_, forward, upstream, run, steps);
  }

 private:
  struct States {
    Array h0, c0, reset_h, reset_c;

    void sort(const Padded& padded, DirectionWeights& w) {
      const Layer& l = padded.l_;
      w.h0 = (h0 = padded.sort(w.h0, l.P, l.dtype)).at(0);
      w.c0 = (c0 = padded.sort(w.c0, l.H, l.dtype)).at(0);
      w.reset_h = (reset_h = padded.sort(w.reset_h, l.P, l.dtype)).at(0);
      w.reset_c = (reset_c = padded.sort(w.reset_c, l.H, l.dtype)).at(0);
    }
  };

  int64_t place(int64_t t, int64_t b) const { return t * l_.B + order_[b]; }

  // NaN, as all padding is.
  Array padding(int64_t columns) const { return Array(l_.dtype, l_.T * l_.B * columns); }

  // From packed rows [N, columns]; nothing from null.
  Array pad(const void* packed, int64_t columns) const {
    if (!packed) return {};
    Array batch = padding(columns);
    const int64_t bytes = columns * size_of(l_.dtype);
    for (int64_t t = 0; t < l_.T; ++t)
      for (int64_t b = 0; b < l_.active[t]; ++b)
        std::memcpy(batch.at(place(t, b) * columns),
                    static_cast<const char*>(packed) + l_.row(t, b) * bytes, bytes);
    return batch;
  }

  // Leaves of `batch` only what was written beside the sequences' rows, which must be nothing.
  void pack(Array& batch, int64_t columns, void* packed) const {
    const int64_t bytes = columns * size_of(l_.dtype);
    for (int64_t t = 0; t < l_.T; ++t)
      for (int64_t b = 0; b < l_.active[t]; ++b) {
        void* const row = batch.at(place(t, b) * columns);
        std::memcpy(static_cast<char*>(packed) + l_.row(t, b) * bytes, row, bytes);
        std::memset(row, 0xff, bytes);
      }
    CHECK(batch == padding(columns));
  }

  // States [B, columns] to the places of their sequences.
  Array sort(const void* states, int64_t columns, DType dtype) const {
    if (!states) return {};
    Array sorted(dtype, l_.B * columns);
    const int64_t bytes = columns * size_of(dtype);
    for (int64_t b = 0; b < l_.B; ++b)
      std::memcpy(sorted.at(order_[b] * columns), static_cast<const char*>(states) + b * bytes,
                  bytes);
    return sorted;
  }

  void unsort(const Array& sorted, int64_t columns, void* states) const {
    if (sorted.size() == 0) return;
    const int64_t bytes =
        static_cast<const char*>(sorted.at(columns)) - static_cast<const char*>(sorted.at(0));
    for (int64_t b = 0; b < l_.B; ++b)
      std::memcpy(static_cast<char*>(states) + b * bytes, sorted.at(order_[b] * columns), bytes);
  }

  const Layer& l_;
  std::vector<int64_t> order_;
};

}  // namespace rnn_fused
