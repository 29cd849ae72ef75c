// Layers whose timesteps, or rows, lie more than 2^31 elements apart: the address arithmetic of a
// tensor that no memory would hold. Only the pages that are touched exist.
#pragma once

#include <doctest/doctest.h>
#include <sys/mman.h>

#include <memory>

#include "tests/cpp/layer.h"

namespace rnn_fused {

// Address space without memory behind it, but for the pages that are touched.
class AddressSpace {
 public:
  explicit AddressSpace(int64_t bytes) : bytes_(static_cast<size_t>(bytes)) {
    base_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    INFO("mmap of ", bytes, " bytes of address space");
    REQUIRE(base_ != MAP_FAILED);
  }
  AddressSpace(const AddressSpace&) = delete;
  ~AddressSpace() { munmap(base_, bytes_); }

  char* at(int64_t byte) const { return static_cast<char*>(base_) + byte; }

 private:
  size_t bytes_;
  void* base_;
};

// How far apart, in comparison with the layer's own tensors.
struct Spread {
  int64_t rows = 0;      // between the timesteps, more than there are
  int64_t elements = 0;  // between the rows of output and gates, more than there are
};

// Timesteps whose rows no 32 bits count, and rows that are each as far as 32 bits of elements go.
constexpr Spread kFarTimesteps = {(int64_t{1} << 30) + 3, 0};
constexpr Spread kFarRows = {0, (int64_t{1} << 31) + 5};

// `width` columns of every row of a layer, which are `columns` apart where row_start says, and the
// same elements without the gaps. An empty one has a null pointer.
class FarTensor {
 public:
  FarTensor() = default;
  FarTensor(const Layer& l, const std::vector<int64_t>& starts, int64_t element_bytes,
            int64_t width, int64_t columns)
      : width_bytes_(width * element_bytes),
        row_bytes_(columns * element_bytes),
        element_bytes_(element_bytes) {
    for (int64_t t = 0; t < l.T; ++t)
      for (int64_t b = 0; b < l.active[t]; ++b) rows_.push_back(starts[t] + b);
    space_ = std::make_unique<AddressSpace>((rows_.back() + 1) * row_bytes_);
    for (int64_t row : rows_)  // NaN until it is written, as an Array is
      std::memset(space_->at(row * row_bytes_), 0xff, width_bytes_);
  }

  void* at(int64_t column) const { return space_ ? space_->at(column * element_bytes_) : nullptr; }
  // `from`: [N, width] without gaps.
  void scatter(const void* from) const {
    for (size_t n = 0; n < rows_.size(); ++n)
      std::memcpy(space_->at(rows_[n] * row_bytes_),
                  static_cast<const char*>(from) + n * width_bytes_, width_bytes_);
  }
  void gather(void* to) const {
    for (size_t n = 0; n < rows_.size(); ++n)
      std::memcpy(static_cast<char*>(to) + n * width_bytes_, space_->at(rows_[n] * row_bytes_),
                  width_bytes_);
  }

 private:
  int64_t width_bytes_ = 0, row_bytes_ = 0, element_bytes_ = 0;
  std::vector<int64_t> rows_;
  std::unique_ptr<AddressSpace> space_;
};

// The tensors of a layer's passes, spread out.
class FarLayer {
 public:
  FarLayer(const Layer& layer, const Spread& spread)
      : layer_(layer), spread_(spread), starts_(layer.starts) {
    for (int64_t t = 0; t < layer.T; ++t) starts_[t] += t * spread.rows;
    input_ = copy(layer.input, layer.I, layer.I);
    if (layer.resets) {
      resets_ = FarTensor(layer, starts_, 1, 1, 1);
      resets_.scatter(layer.reset_flags.data());
    }
  }

  LayerShape shape() const {
    LayerShape shape = layer_.shape();
    if (spread_.rows) {
      shape.batch_sizes = layer_.active.data();
      shape.row_start = starts_.data();
    }
    if (layer_.resets) shape.resets = static_cast<const bool*>(resets_.at(0));
    return shape;
  }

  int64_t row_start(int64_t t) const { return starts_[t]; }
  int64_t output_stride() const { return layer_.output_stride() + spread_.elements; }

  // [N, width], with the row stride `columns`; not where `like` is empty.
  FarTensor tensor(const Array& like, DType dtype, int64_t width, int64_t columns) const {
    return like.size() ? FarTensor(layer_, starts_, size_of(dtype), width, columns) : FarTensor();
  }
  FarTensor copy(const Array& from, int64_t width, int64_t columns) const {
    FarTensor tensor = this->tensor(from, layer_.dtype, width, columns);
    if (from.size()) tensor.scatter(from.at(0));
    return tensor;
  }
  FarTensor copy_cells(const Array& from) const {
    FarTensor tensor = this->tensor(from, accumulation(layer_.dtype), layer_.H, layer_.H);
    if (from.size()) tensor.scatter(from.at(0));
    return tensor;
  }

  // The results of run_forward, from tensors that are spread out.
  template <class Run>
  Forward run_forward(bool save, const Array* products, const Run& run) const {
    const Layer& l = layer_;
    Forward result(l, l.dtype, accumulation(l.dtype), save);
    const int64_t GH = l.G() * l.H, width = l.rnn() ? l.output_stride() : save ? l.S() * l.H : GH;
    ForwardParams params{
        shape(),         {},  input_.at(0), l.I, products != nullptr, width + spread_.elements,
        output_stride(), save};
    const FarTensor output = tensor(result.output, l.dtype, l.output_stride(), output_stride());
    FarTensor gates[2], cells[2];
    for (int d = 0; d < l.directions; ++d) {
      Forward::Direction& out = result.direction[d];
      void* place = l.rnn() && products ? output.at(d * l.P) : nullptr;
      if (!l.rnn() && (save || products)) {
        gates[d] = tensor(l.input, l.dtype, width, params.gates_stride);
        place = gates[d].at(0);
      }
      cells[d] = tensor(out.cells, accumulation(l.dtype), l.H, l.H);
      for (int64_t t = 0, n = 0; products && t < l.T; ++t)
        for (int64_t b = 0; b < l.active[t]; ++b, ++n)
          std::memcpy(
              static_cast<char*>(place) + (starts_[t] + b) * params.gates_stride * size_of(l.dtype),
              products[d].at(n * GH), GH * size_of(l.dtype));
      params.direction[d] = {l.weights(d),
                             l.direction[d].weight_ih.at(0),
                             place,
                             cells[d].at(0),
                             output.at(d * l.P),
                             out.h_n.at(0),
                             out.c_n.at(0)};
    }
    run(params);
    output.gather(result.output.at(0));
    for (int d = 0; d < l.directions; ++d) {
      if (result.direction[d].gates.size()) gates[d].gather(result.direction[d].gates.at(0));
      if (result.direction[d].cells.size()) cells[d].gather(result.direction[d].cells.at(0));
    }
    return result;
  }

  // Those of run_backward.
  template <class Run>
  Backward run_backward(const Forward& forward, const Upstream& upstream, const Run& run) const {
    const Layer& l = layer_;
    Backward result(l, l.dtype);
    BackwardParams params{shape(), {}, output_stride()};
    const FarTensor output = copy(forward.output, l.output_stride(), output_stride());
    const FarTensor grad_output = copy(upstream.output, l.output_stride(), output_stride());
    FarTensor gates[2], cells[2], grads[2], projected[2], hidden[2];
    for (int d = 0; d < l.directions; ++d) {
      const Forward::Direction& saved = forward.direction[d];
      Backward::Direction& out = result.direction[d];
      const int64_t SH = l.S() * l.H;
      gates[d] = copy(saved.gates, SH, SH);
      cells[d] = copy_cells(saved.cells);
      grads[d] = tensor(out.gates, l.dtype, SH, SH);
      projected[d] = tensor(out.projected, l.dtype, l.P, l.P);
      hidden[d] = tensor(out.hidden, l.dtype, l.H, l.H);
      params.direction[d] = {l.weights(d),
                             gates[d].at(0),
                             cells[d].at(0),
                             output.at(d * l.P),
                             grad_output.at(d * l.P),
                             upstream.h_n[d].at(0),
                             upstream.c_n[d].at(0),
                             nullptr,
                             grads[d].at(0),
                             projected[d].at(0),
                             hidden[d].at(0),
                             out.h0.at(0),
                             out.c0.at(0),
                             out.reset_h.at(0),
                             out.reset_c.at(0)};
    }
    run(params);
    for (int d = 0; d < l.directions; ++d) {
      Backward::Direction& out = result.direction[d];
      grads[d].gather(out.gates.at(0));
      if (out.projected.size()) projected[d].gather(out.projected.at(0));
      if (out.hidden.size()) hidden[d].gather(out.hidden.at(0));
    }
    return result;
  }

 private:
  const Layer& layer_;
  const Spread spread_;
  std::vector<int64_t> starts_;
  FarTensor input_, resets_;
};

}  // namespace rnn_fused
