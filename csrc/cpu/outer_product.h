// The gradients of weights: outer products summed over all rows, from the tiles of the loop itself.
#pragma once

#include "csrc/cpu/team.h"
#include "csrc/cpu/weights.h"

namespace rnn_fused::RNN_FUSED_ISA {

// One part's share of an outer product: some rows of the result. The columns of the right sides
// stand side by side in registers, so that both fill a panel and share the work on the left side.
//
// N has no bound, and a chain of so many additions in float would lose digits: chains of products
// are added up to blocks in float, and blocks in double.
template <class T>
class OuterPart {
  using A = Acc<T>;
  using V = Vec<A>;
  // Of both sides: T itself, or widened where no instruction multiplies T.
  using E = std::conditional_t<kTiled<T>, T, Operand<T>>;
  using Right = OuterProductParams::Right;
  static constexpr int kDepth = Product<E>::kDepth, kRun = Product<E>::kRun;
  static constexpr int kWidth = kLanes<A>;
  static constexpr int kVectors = 4;
  static constexpr int64_t kPanel = kVectors * kWidth;
  static constexpr int64_t kTile = kTileRows<E, kVectors>;
  static constexpr int64_t kChain = 256;   // a panel so deep leaves room in the second-level cache
  static constexpr int64_t kBlock = 1024;  // of N: repays reading and writing the totals

 public:
  // So few rows are not worth rearranging.
  static constexpr int64_t kFew = 8;

  OuterPart() = default;
  OuterPart(const OuterProductParams& p, Range rows)
      : p_(&p), rows_(rows), count_(rows.end - rows.begin) {
    for (const Right& right : p.right) registers_ += (right.columns + kWidth - 1) / kWidth;
    sums_ = Buffer<double>::zeros(count_);
    if (p.N <= kFew) return;
    ld_ = round_up(registers_, kVectors) * kWidth;
    several_ = p.N > kBlock;
    const int64_t depth = round_up(std::min(p.N, kBlock), kRun);
    // Tiles a power of two apart would evict each other from the cache: a line more.
    tile_size_ = depth * kTile + static_cast<int64_t>(64 / sizeof(E));
    if (several_) totals_ = Buffer<double>::zeros(count_ * ld_);
    chain_sums_ = Buffer<A>(round_up(count_, kWidth));
    left_ = Buffer<Operand<E>>((count_ + kTile - 1) / kTile * tile_size_);
    left_rows_ = Buffer<E>(round_up(count_, kWidth) * kRun);
    right_ = Buffer<E>(depth * kPanel);
  }

  void run() {
    if (p_->N <= kFew)
      run_few();
    else
      run_blocks();
    for (void* sums : p_->sums)
      for (int64_t r = 0; sums && r < count_; r += kWidth) {
        alignas(64) A lanes[kWidth] = {};
        const int n = lanes_left<T>(count_ - r);
        for (int i = 0; i < n; ++i) lanes[i] = static_cast<A>(sums_[r + i]);
        put(sums, rows_.begin + r, load(lanes), n);
      }
  }

 private:
  const T* left(int64_t n) const {
    return static_cast<const T*>(p_->left) + n * p_->left_stride + rows_.begin;
  }

  // A register of columns of the right sides: where it lies, and how many lanes of it exist.
  struct Columns {
    const Right* right;
    int64_t first;
    int lanes;
  };
  Columns columns(int64_t q) const {
    const Right* right = p_->right;
    const int64_t of_first = (right->columns + kWidth - 1) / kWidth;
    if (q >= of_first) {
      ++right;
      q -= of_first;
    }
    return {right, q * kWidth, lanes_left<T>(right->columns - q * kWidth)};
  }

  void write(int64_t r, const Columns& c, V value) const {
    put(c.right->out, (rows_.begin + r) * c.right->columns + c.first, value, c.lanes);
  }

  // Into a result, at element i.
  void put(void* result, int64_t i, V value, int lanes) const {
    if (p_->accumulate) {
      A* const sum = static_cast<A*>(result) + i;
      store(sum, load(sum, lanes) + value, lanes);
    } else {
      store(static_cast<T*>(result) + i, value, lanes);
    }
  }

  void run_few() {
    for (int64_t r = 0; r < count_; ++r) {
      A factor[kFew];
      for (int64_t n = 0; n < p_->N; ++n) {
        factor[n] = to_accumulation(left(n)[r]);
        sums_[r] += factor[n];
      }
      for (const Right& right : p_->right) {
        for (int64_t c = 0; c < right.columns; c += kWidth) {
          const int lanes = lanes_left<T>(right.columns - c);
          V sum{};
          for (int64_t n = 0; n < p_->N; ++n)
            sum += broadcast(factor[n]) * load(static_cast<const T*>(right.row[n]) + c, lanes);
          write(r, {&right, c, lanes}, sum);
        }
      }
    }
  }

  void run_blocks() {
    for (int64_t n = 0; n < p_->N; n += kBlock) {
      const int64_t depth = std::min(kBlock, p_->N - n);
      take_left(n, depth);
      for (int64_t q = 0; q < registers_; q += kVectors) {
        take_right(n, depth, q);
        for (int64_t r = 0; r < count_; r += kTile) {
          alignas(64) A block[kTile * kPanel];
          multiply_block(r, depth, q, block);
          finish(r, q, block);
        }
      }
    }
    for (int64_t r = 0; several_ && r < count_; ++r)
      for (int64_t q = 0; q < registers_; ++q) {
        const double* total = totals_ + r * ld_ + q * kWidth;
        alignas(64) A lanes[kWidth];
        for (int i = 0; i < kWidth; ++i) lanes[i] = static_cast<A>(total[i]);
        write(r, columns(q), load(lanes));
      }
  }

  int height(int64_t r) const { return static_cast<int>(std::min(kTile, count_ - r)); }

  void multiply_block(int64_t r, int64_t depth, int64_t q, A* block) const {
    alignas(64) A chain[kTile * kPanel];
    for (int64_t k = 0; k < depth; k += kChain) {
      multiply<E, kVectors>(
          height(r), (registers_ - q) * kWidth,
          {left_ + r / kTile * tile_size_ + k * kTile, kRun, kTile, right_ + k * kPanel, kPanel,
           round_up(std::min(kChain, depth - k), kRun), kZeros<A>, 0, k ? chain : block, kPanel});
      for (int64_t i = 0; k && i < height(r) * kPanel; i += kWidth)
        store(block + i, load(block + i) + load(chain + i));
    }
  }

  void finish(int64_t r, int64_t q, const A* block) const {
    for (int i = 0; i < height(r); ++i, block += kPanel) {
      const int64_t last = std::min<int64_t>(kVectors, registers_ - q);
      if (several_)
        add(block, last * kWidth, totals_ + (r + i) * ld_ + q * kWidth);
      else
        for (int64_t v = 0; v < last; ++v) write(r + i, columns(q + v), load(block + v * kWidth));
    }
  }

  static void add(const A* values, int64_t size, double* totals) {
    for (int64_t i = 0; i < size; ++i) totals[i] += values[i];
  }

  // left_ [tiles, depth / kRun, kTile, kRun]: what a tile reads lies together.
  void take_left(int64_t n, int64_t depth) {
    for (int64_t k = 0; k < round_up(depth, kRun); k += kDepth) {
      const T* rows[kDepth];
      for (int i = 0; i < kDepth; ++i) rows[i] = k + i < depth ? left(n + k + i) : nullptr;
      if constexpr (std::is_same_v<E, T> && kDepth == 1 && !kTiled<E>) {
        take_columns(rows[0], k);
      } else {
        E* const row = left_rows_ + k % kRun * round_up(count_, kWidth);
        for (int64_t c = 0; c < count_; c += kWidth)
          interleave<E>(rows, c, lanes_left<T>(count_ - c), row + c * kDepth);
        if constexpr (!kTiled<E>)
          take_columns(row, k);
        else if ((k + kDepth) % kRun == 0)
          transpose_run(k + kDepth - kRun);
      }
      if (p_->sums[0] && k < depth) add_to_sums(rows, k, depth);
    }
  }

  // One run of all columns, [columns, kRun].
  void take_columns(const E* row, int64_t k) {
    E* out = left_ + k * kTile;
    int64_t r = 0;
    for (; r + kTile <= count_; r += kTile, out += tile_size_)
      std::memcpy(out, row + r * kRun, kTile * kRun * sizeof(E));
    std::copy_n(row + r * kRun, (count_ - r) * kRun, out);
  }

  // The same from [kRun / kDepth, columns, kDepth].
  void transpose_run(int64_t k) {
    static_assert(!kTiled<E> || (kRun == kWidth * kDepth && kTile % kWidth == 0));
    for (int64_t r = 0; r < count_; r += kWidth) {
      VecLike<A, Word<E>> square[kWidth];
      for (int i = 0; i < kWidth; ++i)
        square[i] = load_as<VecLike<A, Word<E>>>(
            left_rows_ + i * kDepth * round_up(count_, kWidth) + r * kDepth);
      transpose_step<kWidth / 2>(square, std::make_integer_sequence<int, kWidth>());
      Operand<E>* const out = left_ + r / kTile * tile_size_ + k * kTile + r % kTile * kRun;
      for (int i = 0; i < kWidth; ++i) store_left(out + i * kRun, square[i]);
    }
  }

  // The rows [k, k + kDepth) of a block.
  void add_to_sums(const T* const* rows, int64_t k, int64_t depth) {
    if (k % kChain == 0) std::fill_n(chain_sums_.get(), round_up(count_, kWidth), A{});
    for (int64_t c = 0; c < count_; c += kWidth)
      for (int i = 0; i < kDepth && rows[i]; ++i)
        store(chain_sums_ + c,
              load(chain_sums_ + c) + load(rows[i] + c, lanes_left<T>(count_ - c)));
    if ((k + kDepth) % kChain == 0 || k + kDepth >= depth)
      add(chain_sums_.get(), count_, sums_.get());
  }

  // right_ [depth / kDepth, kPanel, kDepth]; a register without columns is never used.
  void take_right(int64_t n, int64_t depth, int64_t q) {
    for (int64_t v = 0; v < std::min<int64_t>(kVectors, registers_ - q); ++v) {
      const Columns c = columns(q + v);
      for (int64_t k = 0; k < round_up(depth, kRun); k += kDepth) {
        const T* rows[kDepth];
        for (int i = 0; i < kDepth; ++i)
          rows[i] = k + i < depth ? static_cast<const T*>(c.right->row[n + k + i]) : nullptr;
        interleave<E>(rows, c.first, c.lanes, right_ + k * kPanel + v * kWidth * kDepth);
      }
    }
  }

  const OuterProductParams* p_ = nullptr;
  Range rows_{};
  int64_t count_ = 0, registers_ = 0, ld_ = 0, tile_size_ = 0;
  bool several_ = false;  // blocks
  Buffer<double> totals_, sums_;
  Buffer<A> chain_sums_;
  Buffer<Operand<E>> left_;
  Buffer<E> left_rows_, right_;
};

// Every part owns some rows of the result, so that the sums over N run in one order.
template <class T>
void multiply_outer(const OuterProductParams& p, const Host& host) {
  const int64_t columns = p.right[0].columns + p.right[1].columns;
  const int64_t parts =
      std::min(parts_of(host, static_cast<double>(p.N) * p.rows * columns), p.rows);
  std::unique_ptr<OuterPart<T>[]> part(new OuterPart<T>[parts]);
  for (int64_t i = 0; i < parts; ++i) part[i] = {p, {p.rows * i / parts, p.rows * (i + 1) / parts}};
  parallel_for(host, parts, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) part[i].run();
  });
}

}  // namespace rnn_fused::RNN_FUSED_ISA
