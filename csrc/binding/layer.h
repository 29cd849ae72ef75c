// The arguments of the operators, checked and made contiguous: what all passes share.
#pragma once

#include <cmath>
#include <cstdlib>
#include <memory>
#include <numeric>

#include "csrc/binding/compat.h"
#include "csrc/core/params.h"

namespace rnn_fused {

inline Cell parse_cell(const std::string& name) {
  if (name == "lstm") return Cell::lstm;
  if (name == "gru") return Cell::gru;
  if (name == "rnn_tanh") return Cell::rnn_tanh;
  RNN_FUSED_CHECK(name == "rnn_relu", "cell must be lstm, gru, rnn_tanh or rnn_relu, got '", name,
                  "'");
  return Cell::rnn_relu;
}

inline DType parse_dtype(const std::string& cell, ScalarType type) {
  switch (type) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Double: return DType::f64;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: break;
  }
  fail("[", cell, "] input must be float32, float64, bfloat16 or float16, got ",
       torch::headeronly::toString(type));
}

inline Options parse_options(const std::string& cell, DType dtype, double gate_slope,
                             std::optional<double> cell_clip, std::optional<double> grad_clip) {
  const auto check = [&](const char* what, double value) {
    const double used = dtype == DType::f64 ? value : static_cast<float>(value);
    RNN_FUSED_CHECK(std::isfinite(used) && used > 0, "[", cell, "] ", what,
                    " must be positive and finite", used == value ? "" : " in float32", ", got ",
                    value);
  };
  Options options;
  check("gate_slope", gate_slope);
  RNN_FUSED_CHECK(gate_slope == 1 || cell == "lstm" || cell == "gru", "[", cell,
                  "] gate_slope needs gates, which an RNN has not, got ", gate_slope);
  options.f64.gate_slope = gate_slope;
  if (cell_clip) {
    check("cell_clip", *cell_clip);
    RNN_FUSED_CHECK(cell == "lstm", "[", cell, "] cell_clip needs the c of an LSTM, got ",
                    *cell_clip);
    options.f64.cell_clip = *cell_clip;
  }
  if (grad_clip) {
    check("grad_clip_value", *grad_clip);
    options.f64.grad_clip = *grad_clip;
  }
  options.f32 = {static_cast<float>(options.f64.gate_slope),
                 static_cast<float>(options.f64.cell_clip),
                 static_cast<float>(options.f64.grad_clip)};
  return options;
}

inline std::string shape_string(torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  std::ostringstream s;
  s << '[';
  for (size_t i = 0; i < sizes.size(); ++i) s << (i ? ", " : "") << sizes[i];
  s << ']';
  return s.str();
}

// The sequences that a layer or a stack of layers runs over, and its states.
struct Sequences {
  std::string name;  // of the cell, for messages
  LayerShape shape{};
  int64_t states = 0;  // matrices of hx: the directions of all layers
  int64_t N, I;
  // Rows that products have to cover: those of the timesteps, or all N where only the device can
  // tell them from the tail.
  int64_t rows;
  bool padded = false;
  Tensor input, hx;
  OptionalTensor cx, batch_sizes;
  OptionalTensor resets, reset_hx, reset_cx;  // with resets: the states too, zero where not given
  std::vector<int64_t> row_start;
  std::vector<int64_t> active, order;  // padded: counted and sorted here
  Tensor device_row_start;             // [T + 1], where batch_sizes are on the device

  // Leaves the sizes of h to the derived class, which then calls read_states.
  Sequences(const Tensor& input_, const OptionalTensor& hx_, const OptionalTensor& sizes,
            const std::string& cell, int64_t directions, double gate_slope,
            std::optional<double> cell_clip, std::optional<double> grad_clip)
      : name(cell) {
    shape.cell = parse_cell(cell);
    shape.dtype = parse_dtype(cell, input_.scalar_type());
    shape.options = parse_options(cell, shape.dtype, gate_slope, cell_clip, grad_clip);
    RNN_FUSED_CHECK(directions == 1 || directions == 2, "[", name,
                    "] a layer must have 1 or 2 directions, got ", directions);
    shape.directions = static_cast<int>(directions);
    read_rows(input_, sizes);
    RNN_FUSED_CHECK(hx_ || !batch_sizes, "[", name,
                    "] hx must be given with batch_sizes, which do not tell B");
    RNN_FUSED_CHECK(!hx_ || hx_->dim() == 3, "[", name,
                    "] hx must have 3 dimensions [D, B, P], got ", hx_ ? hx_->dim() : 0);
    if (batch_sizes) read_batch(hx_->size(1));
  }

  // shape points into this object.
  Sequences(const Sequences&) = delete;
  Sequences& operator=(const Sequences&) = delete;

  void read_states(const Tensor& input_, const OptionalTensor& hx_, const OptionalTensor& cx_,
                   int64_t count) {
    states = count;
    RNN_FUSED_CHECK(cx_.has_value() == (lstm() && hx_), "[", name, "] cx must be ",
                    lstm() && hx_ ? "given" : "absent", hx_ ? "" : " where hx is");
    input = checked(input_, "input", input_.sizes(), "");
    hx = state(hx_, "hx", shape.P, "P");
    // Both zero, they are one, since nothing writes to them.
    if (lstm()) cx = hx_ || shape.projected() ? state(cx_, "cx", shape.H, "H") : hx;
  }

  void read_resets(const OptionalTensor& flags, const OptionalTensor& h, const OptionalTensor& c) {
    RNN_FUSED_CHECK(flags || (!h && !c), "[", name,
                    "] reset_hx and reset_cx need resets, got none");
    if (!flags) return;
    const auto rows = input.sizes().slice(0, input.dim() - 1);
    RNN_FUSED_CHECK(
        flags->sizes() == rows && flags->scalar_type() == ScalarType::Bool && same_device(*flags),
        "[", name, "] resets must be bool, on the device of input and of shape ",
        batch_sizes ? "[N] = " : "[T, B] = ", shape_string(rows), ", got ",
        torch::headeronly::toString(flags->scalar_type()), " of shape ",
        shape_string(flags->sizes()));
    resets = padded ? packed_flags(as_contiguous(*flags)) : as_contiguous(*flags);
    shape.resets = static_cast<const bool*>(resets->const_data_ptr());
    RNN_FUSED_CHECK(c.has_value() == (h.has_value() && lstm()), "[", name, "] reset_cx must be ",
                    h && lstm() ? "given with reset_hx" : "absent");
    reset_hx = state(h, "reset_hx", shape.P, "P");
    if (lstm()) reset_cx = state(c, "reset_cx", shape.H, "H");
  }

  int64_t D() const { return shape.directions; }
  int64_t G() const { return gate_count(shape.cell); }
  int64_t S() const { return saved_count(shape.cell); }
  bool lstm() const { return shape.cell == Cell::lstm; }
  bool rnn() const { return shape.cell == Cell::rnn_tanh || shape.cell == Cell::rnn_relu; }
  bool has_tail() const { return shape.sizes_on_device || rows < N; }
  // Whether a sequence may have no timestep, so that its final state is its initial one.
  bool has_idle_sequences() const { return shape.sizes_on_device || shape.active(0) < shape.B; }
  ScalarType dtype() const { return input.scalar_type(); }
  // Of c between the steps: the 16-bit types keep float.
  ScalarType cell_dtype() const {
    return shape.dtype == DType::f64 ? ScalarType::Double : ScalarType::Float;
  }

  // Of tensors like the input.
  std::vector<int64_t> rows_shape(int64_t columns) const {
    std::vector<int64_t> sizes(input.sizes().begin(), input.sizes().end());
    sizes.back() = columns;
    return sizes;
  }

  // Of matrix m of the states, as the core takes them.
  void point_to_states(DirectionWeights& direction, int64_t m) const {
    const auto matrix = [&](const OptionalTensor& t, int64_t size) -> const void* {
      if (!t) return nullptr;
      const auto* bytes = static_cast<const char*>(t->const_data_ptr());
      return bytes + m * shape.B * size * t->element_size();
    };
    direction.h0 = matrix(hx, shape.P);
    direction.c0 = matrix(cx, shape.H);
    direction.reset_h = matrix(reset_hx, shape.P);
    direction.reset_c = matrix(reset_cx, shape.H);
  }

  Tensor checked(const Tensor& t, const char* what, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                 const char* dims) const {
    bool same = static_cast<size_t>(t.dim()) == sizes.size();
    for (size_t i = 0; same && i < sizes.size(); ++i) same = t.size(i) == sizes[i];
    RNN_FUSED_CHECK(same, "[", name, "] ", what, " must have shape ", dims, *dims ? " = " : "",
                    shape_string(sizes), ", got ", shape_string(t.sizes()));
    RNN_FUSED_CHECK(!input.defined() || t.scalar_type() == dtype(), "[", name, "] ", what,
                    " must have the dtype of input, ", torch::headeronly::toString(dtype()),
                    ", got ", torch::headeronly::toString(t.scalar_type()));
    RNN_FUSED_CHECK(!input.defined() || same_device(t), "[", name, "] ", what,
                    " must be on the device of input");
    return as_contiguous(t);
  }

  bool same_device(const Tensor& t) const { return t.device() == input.device(); }

  Tensor allocate_if(bool wanted, const std::vector<int64_t>& sizes,
                     std::optional<ScalarType> dtype = std::nullopt) const {
    return allocate(input, wanted ? sizes : std::vector<int64_t>{0}, dtype);
  }

 private:
  // [states, B, size], zero where none is given. axis: the name of the last one.
  Tensor state(const OptionalTensor& t, const char* what, int64_t size, const char* axis) const {
    const std::vector<int64_t> sizes = {states, shape.B, size};
    if (!t) return allocate_zeros(input, sizes);
    const std::string dims = std::string(states > D() ? "[L*D, B, " : "[D, B, ") + axis + "]";
    return checked(*t, what, sizes, dims.c_str());
  }

  Tensor packed_flags(const Tensor& flags) const {
    const bool* const from = static_cast<const bool*>(flags.const_data_ptr());
    Tensor packed = allocate(flags, {N});
    bool* to = static_cast<bool*>(packed.mutable_data_ptr());
    for (int64_t t = 0; t < shape.T; ++t)
      for (int64_t b = 0; b < shape.active(t); ++b) *to++ = from[shape.place(t, b)];
    return packed;
  }

  void read_rows(const Tensor& x, const OptionalTensor& sizes) {
    if (x.dim() == 3) {
      shape.T = x.size(0);
      shape.B = x.size(1);
      rows = N = shape.T * shape.B;
      if (sizes) read_lengths(*sizes);
    } else {
      RNN_FUSED_CHECK(sizes, "[", name, "] input must have 3 dimensions [T, B, I], got ", x.dim());
      RNN_FUSED_CHECK(x.dim() == 2, "[", name, "] packed input must have 2 dimensions [N, I], got ",
                      x.dim());
      RNN_FUSED_CHECK(sizes->dim() == 1 && sizes->scalar_type() == ScalarType::Long &&
                          (sizes->is_cpu() || sizes->device() == x.device()),
                      "[", name,
                      "] batch_sizes must be a vector of int64 on the CPU or the device of input");
      batch_sizes = as_contiguous(*sizes);
      shape.T = sizes->size(0);
      rows = N = x.size(0);
      shape.batch_sizes = batch_sizes->const_data_ptr<int64_t>();
      shape.sizes_on_device = on_device(*sizes);
      if (shape.sizes_on_device)
        start_rows_on_device();
      else
        start_rows();
    }
    I = x.size(x.dim() - 1);
    RNN_FUSED_CHECK(shape.T >= 1, "[", name, "] the sequence must have at least 1 timestep, got ",
                    shape.T);
  }

  // Sorts the sequences of a padded batch, the longest first, and packs their rows.
  void read_lengths(const Tensor& lengths) {
    const int64_t T = shape.T, B = shape.B;
    RNN_FUSED_CHECK(lengths.dim() == 1 && lengths.size(0) == B &&
                        lengths.scalar_type() == ScalarType::Long && lengths.is_cpu(),
                    "[", name, "] lengths must be a vector of int64 on the CPU, of the ", B,
                    " sequences of input, got ", torch::headeronly::toString(lengths.scalar_type()),
                    " of shape ", shape_string(lengths.sizes()));
    const Tensor contiguous = as_contiguous(lengths);
    const int64_t* const length = contiguous.const_data_ptr<int64_t>();
    active.assign(T + 1, 0);
    for (int64_t b = 0; b < B; ++b) {
      RNN_FUSED_CHECK(0 <= length[b] && length[b] <= T, "[", name,
                      "] lengths must be between 0 and T = ", T, ", got ", length[b], " at index ",
                      b);
      if (length[b] > 0) ++active[length[b] - 1];
    }
    for (int64_t t = T; t-- > 0;) active[t] += active[t + 1];
    order.resize(B);
    std::vector<int64_t> next = active;  // a sequence comes after those that reach its end
    for (int64_t b = 0; b < B; ++b) order[next[length[b]]++] = b;
    while (shape.T > 1 && active[shape.T - 1] == 0) --shape.T;
    padded = true;
    shape.order = order.data();
    shape.batch_sizes = active.data();
    N = std::accumulate(active.begin(), active.end(), int64_t{0});
    start_rows();
  }

  static bool on_device(const Tensor& sizes) {
#ifdef RNN_FUSED_EMULATION
    // All tensors are on the CPU; the tests say when a device would keep the values to itself.
    const char* place = std::getenv("RNN_FUSED_EMULATED_SIZES");
    if (place && std::string(place) == "device") return true;
#endif
    return !sizes.is_cpu();
  }

  void start_rows() {
    const int64_t* const counts = shape.batch_sizes;
    rows = 0;
    for (int64_t t = 0; t < shape.T; ++t) {
      RNN_FUSED_CHECK(counts[t] <= N - rows, "[", name,
                      "] batch_sizes must sum to no more than the rows of input, ", N,
                      ", got more at timestep ", t);
      RNN_FUSED_CHECK(counts[t] >= 0 && (t == 0 || counts[t] <= counts[t - 1]), "[", name,
                      "] batch_sizes must not be negative or increase, got ", counts[t],
                      " at timestep ", t);
      row_start.push_back(rows);
      rows += counts[t];
    }
    shape.row_start = row_start.data();
  }

  // Without waiting for the device, so that nothing is checked.
  void start_rows_on_device() {
    using torch::stable::detail::from;
    device_row_start = allocate_zeros(*batch_sizes, {shape.T + 1});
    call<4>("aten::cumsum", "out",
            {from(*batch_sizes), from(int64_t{0}), from(std::optional<ScalarType>()),
             from(vector(device_row_start, shape.T, 1))});
    shape.row_start = device_row_start.const_data_ptr<int64_t>();
  }

  void read_batch(int64_t batch) {
    shape.B = batch;
    RNN_FUSED_CHECK(shape.sizes_on_device || shape.active(0) <= batch, "[", name,
                    "] hx must have the sequences of batch_sizes, at least ", shape.active(0),
                    ", in its second dimension, got ", batch);
  }
};

// One layer: the weights too.
struct Layer : Sequences {
  Tensors weight_ih, weight_hh, bias_ih, bias_hh, weight_hr;

  Layer(const Tensor& input_, const OptionalTensor& hx_, const OptionalTensor& cx_,
        const OptionalTensor& reset_hx_, const OptionalTensor& reset_cx_, const Tensors& weight_ih_,
        const Tensors& weight_hh_, const Tensors& bias_ih_, const Tensors& bias_hh_,
        const Tensors& weight_hr_, const OptionalTensor& sizes, const OptionalTensor& resets_,
        const std::string& cell, double gate_slope, std::optional<double> cell_clip,
        std::optional<double> grad_clip)
      : Sequences(input_, hx_, sizes, cell, static_cast<int64_t>(weight_ih_.size()), gate_slope,
                  cell_clip, grad_clip) {
    RNN_FUSED_CHECK(!weight_hh_.empty() && weight_hh_[0].dim() == 2, "[", name,
                    "] weight_hh must hold a matrix [G*H, P] per direction");
    shape.H = weight_hh_[0].size(0) / G();
    RNN_FUSED_CHECK(shape.H >= 1, "[", name, "] hidden size must be at least 1, got weight_hh ",
                    shape_string(weight_hh_[0].sizes()));
    if (hx_)
      shape.P = hx_->size(2);
    else if (weight_hr_.empty())
      shape.P = shape.H;
    else
      shape.P = weight_hr_[0].dim() == 2 ? weight_hr_[0].size(0) : 0;
    RNN_FUSED_CHECK(!shape.projected() || (lstm() && !weight_hr_.empty()), "[", name,
                    "] hx must have size H = ", shape.H, " in its last dimension, got ", shape.P);
    RNN_FUSED_CHECK(
        weight_hr_.empty() || (shape.P >= 1 && shape.P < shape.H), "[", name,
        "] a projection (weight_hr) must have a size from 1 to less than the hidden size ", shape.H,
        ", got ", shape.P);
    RNN_FUSED_CHECK(bias_ih_.size() == bias_hh_.size(), "[", name,
                    "] bias_ih and bias_hh must be given both or neither, got ", bias_ih_.size(),
                    " and ", bias_hh_.size(), " tensors");
    read_states(input_, hx_, cx_, D());
    const auto list = [&](const Tensors& tensors, const char* what, std::vector<int64_t> sizes,
                          const char* dims, bool optional) {
      RNN_FUSED_CHECK(static_cast<int64_t>(tensors.size()) == D() || (optional && tensors.empty()),
                      "[", name, "] ", what, " must hold ", D(), " tensors",
                      optional ? " or none" : "", ", got ", tensors.size());
      Tensors result;
      for (const Tensor& t : tensors) result.push_back(checked(t, what, sizes, dims));
      return result;
    };
    weight_ih = list(weight_ih_, "weight_ih", {G() * shape.H, I}, "[G*H, I]", false);
    weight_hh = list(weight_hh_, "weight_hh", {G() * shape.H, shape.P}, "[G*H, P]", false);
    bias_ih = list(bias_ih_, "bias_ih", {G() * shape.H}, "[G*H]", true);
    bias_hh = list(bias_hh_, "bias_hh", {G() * shape.H}, "[G*H]", true);
    weight_hr = list(weight_hr_, "weight_hr", {shape.P, shape.H}, "[P, H]", true);
    read_resets(resets_, reset_hx_, reset_cx_);
  }

  // The weights and states of one direction, as the core takes them.
  DirectionWeights direction(int d) const {
    const auto at = [&](const Tensors& list) {
      return list.empty() ? nullptr : list[d].const_data_ptr();
    };
    DirectionWeights direction{at(weight_hh), at(weight_hr), at(bias_ih), at(bias_hh), {}, {}};
    point_to_states(direction, d);
    return direction;
  }
};

// The arguments of a stack of layers, each over the output of the one below, times a mask where
// there are any. Lists have D entries a layer, one layer after the other, and states [L*D, B, ...].
// The rest is checked layer by layer.
class Stack {
 public:
  Stack(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx,
        const OptionalTensor& reset_hx, const OptionalTensor& reset_cx, const Tensors& weight_ih,
        const Tensors& weight_hh, const Tensors& bias_ih, const Tensors& bias_hh,
        const Tensors& weight_hr, const OptionalTensor& sizes, const OptionalTensor& resets,
        const std::string& cell, double gate_slope, std::optional<double> cell_clip,
        std::optional<double> grad_clip, int64_t layers, const Tensors& masks)
      : input_(input),
        cell_(cell),
        layers_(layers),
        states_(static_cast<int64_t>(weight_ih.size())),
        hx_(state(hx, "hx")),
        cx_(state(cx, "cx")),
        reset_hx_(state(reset_hx, "reset_hx")),
        reset_cx_(state(reset_cx, "reset_cx")),
        weight_ih_(list(weight_ih, "weight_ih")),
        weight_hh_(list(weight_hh, "weight_hh")),
        bias_ih_(list(bias_ih, "bias_ih")),
        bias_hh_(list(bias_hh, "bias_hh")),
        weight_hr_(list(weight_hr, "weight_hr")),
        sizes_(sizes),
        resets_(resets ? OptionalTensor(as_contiguous(*resets)) : resets),
        gate_slope_(gate_slope),
        cell_clip_(cell_clip),
        grad_clip_(grad_clip),
        masks_(masks) {
    RNN_FUSED_CHECK(masks.empty() || static_cast<int64_t>(masks.size()) == layers - 1, "[", cell_,
                    "] masks must hold one for each layer but the last, or none, got ",
                    masks.size(), " for ", layers, " layers");
  }

  int64_t layers() const { return layers_; }
  const std::string& cell() const { return cell_; }

  std::unique_ptr<Layer> layer(int64_t l, const Tensor& input) const {
    const auto own = [&](const Tensors& list) {
      const auto count = static_cast<int64_t>(list.size()) / layers_;
      return Tensors(list.begin() + l * count, list.begin() + (l + 1) * count);
    };
    return std::make_unique<Layer>(input, of(hx_, l), of(cx_, l), of(reset_hx_, l),
                                   of(reset_cx_, l), own(weight_ih_), own(weight_hh_),
                                   own(bias_ih_), own(bias_hh_), own(weight_hr_), sizes_, resets_,
                                   cell_, gate_slope_, cell_clip_, grad_clip_);
  }

  // What falls on the output of layer l on its way up, if anything. like: that output, or its
  // gradient.
  OptionalTensor mask(int64_t l, const Tensor& like) const {
    if (masks_.empty()) return {};
    const Tensor& mask = masks_[l];
    RNN_FUSED_CHECK(mask.sizes() == like.sizes() && mask.scalar_type() == like.scalar_type(), "[",
                    cell_, "] masks must be like the outputs that they fall on, of shape ",
                    shape_string(like.sizes()), ", got ",
                    torch::headeronly::toString(mask.scalar_type()), " of shape ",
                    shape_string(mask.sizes()));
    check_device(mask, "masks");
    return as_contiguous(mask);
  }
  // The input of layer l + 1, from the output of layer l.
  Tensor above(int64_t l, const Tensor& output) const {
    const OptionalTensor mask = this->mask(l, output);
    if (!mask) return output;
    const Tensor input = allocate(output, {output.sizes().begin(), output.sizes().end()});
    multiply(as_contiguous(output), *mask, 0, output.numel(), input);
    return input;
  }

  // States, or gradients of states, of all layers; and those of one of them.
  OptionalTensor state(const OptionalTensor& t, const char* what) const {
    if (!t) return t;
    RNN_FUSED_CHECK(t->dim() == 3 && t->size(0) == states_, "[", cell_, "] ", what,
                    " must have 3 dimensions [L*D, B, ...], L*D = ", states_, ", got shape ",
                    shape_string(t->sizes()));
    check_device(*t, what);
    return as_contiguous(*t);
  }
  OptionalTensor of(const OptionalTensor& states, int64_t l) const {
    const int64_t D = states_ / layers_;
    return states ? OptionalTensor(part(*states, l * D, D)) : states;
  }

 private:
  const Tensors& list(const Tensors& tensors, const char* what) const {
    RNN_FUSED_CHECK(layers_ >= 1 && tensors.size() % layers_ == 0, "[", cell_, "] ", what,
                    " must hold as many tensors for each of the layers, at least 1: got ",
                    tensors.size(), " for ", layers_);
    for (const Tensor& t : tensors) check_device(t, what);
    return tensors;
  }
  // Before any layer runs.
  void check_device(const Tensor& t, const char* what) const {
    RNN_FUSED_CHECK(t.device() == input_.device(), "[", cell_, "] ", what,
                    " must be on the device of input");
  }

  const Tensor& input_;
  const std::string& cell_;
  const int64_t layers_, states_;  // of which a layer has D
  const OptionalTensor hx_, cx_, reset_hx_, reset_cx_;
  const Tensors &weight_ih_, &weight_hh_, &bias_ih_, &bias_hh_, &weight_hr_;
  const OptionalTensor sizes_, resets_;
  const double gate_slope_;
  const std::optional<double> cell_clip_, grad_clip_;
  const Tensors& masks_;
};

}  // namespace rnn_fused
