// The large products behind the backward loop, from the tiles of the loop itself.
#pragma once

#include "csrc/cpu/team.h"
#include "csrc/cpu/weights.h"

namespace rnn_fused::RNN_FUSED_ISA {

// As many parts as threads, unless the work does not repay waking them.
inline int64_t parts_of(const Host& host, double multiply_adds) {
  return multiply_adds < kWorkToRepayThreads ? 1 : host.threads;
}

template <class T>
void multiply_by_weights(const InputGradientParams& p, const Host& host) {
  using A = Acc<T>;
  using Matrix = Weights<T, 4, Layout::rows>;
  constexpr int64_t kBlock = 48;  // rows whose gate gradients stay in the cache for every panel
  constexpr bool kDirect = std::is_same_v<Operand<T>, T> && Product<T>::kDepth == 1;

  const int64_t ldk = padded_depth<T>(p.K);
  const int64_t parts = parts_of(host, static_cast<double>(p.N) * p.K * p.I * p.directions);
  Matrix weights[2];
  Buffer<A> sums(parts * kBlock * round_up(p.I, Matrix::kPanelWidth));
  Buffer<Operand<T>> operands = Buffer<Operand<T>>::zeros(kDirect ? 0 : parts * kBlock * ldk);
  for (int d = 0; d < p.directions; ++d)
    weights[d] = Matrix(p.weight_ih[d], p.I, p.K, p.N >= kRowsToRepayPacking);
  const int64_t panels = weights[0].panel_count();
  const int64_t ld = panels * Matrix::kPanelWidth;
  parallel_for(host, parts == 1 ? 1 : panels, [&](int64_t begin, int64_t end) {
    if (parts == 1) end = panels;
    for (int d = 0; d < p.directions; ++d) weights[d].pack(begin, end);
  });

  parallel_for(host, parts, [&](int64_t begin, int64_t end) {
    A* sum = sums + begin * kBlock * ld;
    for (int64_t n = p.N * begin / parts; n < p.N * end / parts; n += kBlock) {
      const int64_t rows = std::min(kBlock, p.N * end / parts - n);
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
            d == 0 ? typename Matrix::From{kZeros<A>, 0, 0}
                   : typename Matrix::From{sum, ld, Matrix::kPanelWidth};
        weights[d].multiply(a, kDirect ? p.stride : ldk, 0, rows, 0, panels, from, to);
      }
      copy_back<T>(sum, ld, rows, p.I, static_cast<T*>(p.grad_input) + n * p.I);
    }
  });
}

// One part's share of an outer product: some rows of the result. The sums over a block of N are
// added up in double: N has no bound, and a chain of so many additions in float would lose digits.
template <class T>
class OuterPart {
  using A = Acc<T>;
  static constexpr int kVectors = 4;
  static constexpr int kWidth = kLanes<A>;
  static constexpr int64_t kBlock = 256;  // of N: a panel so deep fits in the second-level cache

 public:
  static constexpr int64_t kPanel = kVectors * kWidth;
  static constexpr int64_t kTile = kTileRows<kVectors>;

  OuterPart() = default;
  OuterPart(const OuterProductParams& p, Range rows)
      : p_(&p),
        rows_(rows),
        count_(rows.end - rows.begin),
        ld_(round_up(p.columns, kPanel)),
        several_(p.N > kBlock),
        totals_(Buffer<double>::zeros(several_ ? count_ * ld_ : 0)),
        sums_(Buffer<double>::zeros(count_)),
        block_sums_(round_up(count_, kWidth)),
        left_(kBlock * round_up(count_, kTile)),
        row_(round_up(std::max(count_, p.columns), kWidth)),
        right_(kBlock * kPanel) {}

  void run() {
    for (int64_t n = 0; n < p_->N; n += kBlock) {
      const int64_t depth = std::min(kBlock, p_->N - n);
      take_left(n, depth);
      for (int64_t column = 0; column < p_->columns; column += kPanel) {
        take_right(n, depth, column);
        for (int64_t r = 0; r < count_; r += kTile) {
          const int height = static_cast<int>(std::min(kTile, count_ - r));
          alignas(64) A out[kTile * kPanel];
          // The plain product of the accumulation type: left and right are widened.
          multiply<A, kVectors>(height, p_->columns - column,
                                {left_ + r * kBlock, 1, kTile, right_.get(), kPanel, depth,
                                 kZeros<A>, 0, out, kPanel});
          const int64_t width = std::min(kPanel, p_->columns - column);
          for (int i = 0; i < height; ++i) {
            if (several_)
              add(out + i * kPanel, width, totals_ + (r + i) * ld_ + column);
            else
              copy_back<T>(out + i * kPanel, 0, 1, width, result(r + i) + column);
          }
        }
      }
    }
    for (int64_t r = 0; several_ && r < count_; ++r)
      round(totals_ + r * ld_, p_->columns, result(r));
    if (p_->sums) round(sums_.get(), count_, static_cast<T*>(p_->sums) + rows_.begin);
  }

 private:
  T* result(int64_t r) const { return static_cast<T*>(p_->out) + (rows_.begin + r) * p_->columns; }

  static void add(const A* block, int64_t size, double* total) {
    for (int64_t i = 0; i < size; ++i) total[i] += block[i];
  }

  void round(const double* total, int64_t size, T* out) const {
    for (int64_t i = 0; i < size; ++i) row_[i] = static_cast<A>(total[i]);
    copy_back<T>(row_.get(), 0, 1, size, out);
  }

  // left_ [tiles, depth, kTile]: what a tile reads lies together. Rows of `left` are often a power
  // of two apart, and would evict each other from the cache.
  void take_left(int64_t n, int64_t depth) {
    std::fill_n(block_sums_.get(), round_up(count_, kWidth), A{});
    for (int64_t k = 0; k < depth; ++k) {
      const T* source = static_cast<const T*>(p_->left) + (n + k) * p_->left_stride + rows_.begin;
      const A* row;
      if constexpr (std::is_same_v<A, T>) {
        row = source;
      } else {
        copy_matrix<T>(source, 1, count_, row_.get(), 0);
        row = row_.get();
      }
      if (p_->sums)
        for (int64_t c = 0; c < count_; c += kWidth) {
          const int lanes = lanes_left<A>(count_ - c);
          store(block_sums_ + c, load(block_sums_ + c) + load(row + c, lanes));
        }
      int64_t r = 0;
      for (; r + kTile <= count_; r += kTile)
        std::memcpy(left_ + r * kBlock + k * kTile, row + r, kTile * sizeof(A));
      std::copy_n(row + r, count_ - r, left_ + r * kBlock + k * kTile);
    }
    add(block_sums_.get(), count_, sums_.get());
  }

  // right_ [depth, kPanel], zeros beyond the last column.
  void take_right(int64_t n, int64_t depth, int64_t column) {
    for (int64_t k = 0; k < depth; ++k) {
      const T* row = static_cast<const T*>(p_->right[n + k]) + column;
      for (int64_t v = 0; v < kPanel; v += kWidth) {
        const int64_t rest = p_->columns - column - v;
        store(right_ + k * kPanel + v, rest > 0 ? load(row + v, lanes_left<T>(rest)) : Vec<A>{});
      }
    }
  }

  const OuterProductParams* p_ = nullptr;
  Range rows_{};
  int64_t count_ = 0, ld_ = 0;
  bool several_ = false;  // blocks
  Buffer<double> totals_, sums_;
  Buffer<A> block_sums_, left_, row_, right_;
};

// Every part owns some rows of the result, so that the sums over N run in one order.
template <class T>
void multiply_outer(const OuterProductParams& p, const Host& host) {
  const int64_t parts =
      std::min(parts_of(host, static_cast<double>(p.N) * p.rows * p.columns), p.rows);
  std::unique_ptr<OuterPart<T>[]> part(new OuterPart<T>[parts]);
  for (int64_t i = 0; i < parts; ++i) part[i] = {p, {p.rows * i / parts, p.rows * (i + 1) / parts}};
  parallel_for(host, parts, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) part[i].run();
  });
}

}  // namespace rnn_fused::RNN_FUSED_ISA
