// The gradient of the input: all rows of gate gradients times W_ih, from the tiles of the loop.
#pragma once

#include "csrc/cpu/team.h"
#include "csrc/cpu/weights.h"

namespace rnn_fused::RNN_FUSED_ISA {

template <class T>
void multiply_by_weights(const InputGradientParams& p, const Host& host) {
  using A = Acc<T>;
  using Matrix = Weights<T, 4, Layout::rows>;
  constexpr int64_t kBlock =
      round_up(48, Matrix::kTile);  // rows whose gate gradients stay in the cache for every panel
  constexpr bool kDirect = std::is_same_v<Operand<T>, T> && Product<T>::kDepth == 1;

  const int64_t ldk = padded_depth<T>(p.K);
  const int64_t parts = parts_of(host, static_cast<double>(p.N) * p.K * p.I * p.directions);
  Matrix weights[2];
  Buffer<A> sums(parts * kBlock * round_up(p.I, Matrix::kPanelWidth));
  Buffer<Operand<T>> operands = Buffer<Operand<T>>::zeros(kDirect ? 0 : parts * kBlock * ldk);
  for (int d = 0; d < p.directions; ++d)
    weights[d] =
        Matrix(p.weight_ih[d], p.I, p.K, std::is_same_v<T, split32> || p.N >= kRowsToRepayPacking);
  const int64_t panels = weights[0].panel_count();
  const int64_t ld = panels * Matrix::kPanelWidth;
  parallel_for(
      host, panels,
      [&](int64_t begin, int64_t end) {
        for (int d = 0; d < p.directions; ++d) weights[d].pack(begin, end);
      },
      parts > 1 && worth_packing_together(static_cast<double>(p.K) * p.I * p.directions));

  parallel_for(host, parts, [&](int64_t begin, int64_t end) {
    A* sum = sums + begin * kBlock * ld;
    for (int64_t n = p.N * begin / parts; n < p.N * end / parts; n += kBlock) {
      const int64_t rows = std::min(kBlock, p.N * end / parts - n);
      if (p.accumulate) copy_matrix<T>(p.grad_input, rows, p.I, sum, ld, p.place + n);
      for (int d = 0; d < p.directions; ++d) {
        const T* grads = static_cast<const T*>(p.grad_gates[d]) + n * p.stride;
        const Operand<T>* a;
        if constexpr (kDirect) {
          a = grads;
        } else {
          Operand<T>* block = operands + begin * kBlock * ldk;
          for (int64_t r = 0; r < rows; ++r)
            copy_matrix<T>(grads + r * p.stride, 1, p.K, block + r * ldk, ldk);
          a = block;
        }
        const typename Matrix::To to = {sum, ld, Matrix::kPanelWidth};
        const typename Matrix::From from =
            d == 0 && !p.accumulate ? typename Matrix::From{kZeros<A>, 0, 0}
                                    : typename Matrix::From{sum, ld, Matrix::kPanelWidth};
        weights[d].multiply(a, kDirect ? p.stride : ldk, 0, rows, 0, panels, from, to);
      }
      copy_back<T>(sum, ld, rows, p.I, p.grad_input, p.place + n);
    }
  });
}

}  // namespace rnn_fused::RNN_FUSED_ISA
