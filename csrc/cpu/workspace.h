// Scratch memory of one call, aligned to cache lines.
#pragma once

#include <cstddef>
#include <memory>
#include <new>

#include "csrc/cpu/simd.h"

namespace rnn_fused::RNN_FUSED_ISA {

template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size)
      : data_(static_cast<T*>(::operator new[](bytes(size), kAlignment))) {}

  static Buffer zeros(int64_t size) {
    Buffer buffer(size);
    std::memset(static_cast<void*>(buffer.get()), 0, bytes(size));
    return buffer;
  }

  T* get() const { return data_.get(); }
  T& operator[](int64_t i) const { return data_.get()[i]; }
  T* operator+(int64_t offset) const { return data_.get() + offset; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  static std::size_t bytes(int64_t size) { return static_cast<std::size_t>(size) * sizeof(T); }

  struct Free {
    void operator()(T* data) const { ::operator delete[](data, kAlignment); }
  };
  std::unique_ptr<T[], Free> data_;
};

// Copies a matrix [rows, columns] of T into one of Out (T, or its accumulation type) with the row
// stride `ld`; null gives nothing. With `order`, its rows are the source's order[0], order[1], ...
template <class T, class Out>
void copy_matrix(const void* source, int64_t rows, int64_t columns, Out* out, int64_t ld,
                 const int64_t* order = nullptr) {
  const T* from = static_cast<const T*>(source);
  if (!from) return;
  for (int64_t r = 0; r < rows; ++r) {
    const T* const row = from + (order ? order[r] : r) * columns;
    for (int64_t c = 0; c < columns; c += kLanes<Acc<T>>) {
      const int n = lanes_left<T>(columns - c);
      store(out + r * ld + c, load(row + c, n), n);
    }
  }
}

// And back, rounding to T.
template <class T, class In>
void copy_back(const In* from, int64_t ld, int64_t rows, int64_t columns, void* target,
               const int64_t* order = nullptr) {
  T* out = static_cast<T*>(target);
  for (int64_t r = 0; r < rows; ++r) {
    T* const row = out + (order ? order[r] : r) * columns;
    for (int64_t c = 0; c < columns; c += kLanes<Acc<T>>) {
      const int n = lanes_left<T>(columns - c);
      store(row + c, load(from + r * ld + c, n), n);
    }
  }
}

}  // namespace rnn_fused::RNN_FUSED_ISA
