// How the layers of a stack run side by side on a CUDA device, as a StackPlan has them.
#pragma once

#include "csrc/binding/cuda_layer.h"

namespace rnn_fused {

// A plan's launch, where fewer layers than it has places run.
inline CudaPlan with_layers(const StackPlan& how, size_t running) {
  CudaPlan plan = how.plan;
  plan.blocks = plan.blocks / how.together * static_cast<int64_t>(running);
  return plan;
}

// For all layers that run side by side.
inline Tensor stack_workspace(const Layer& layer, const StackPlan& how, bool backward) {
  LayerShape all = layer.shape;
  all.directions = how.together;
  return workspace(layer, persistent_workspace(how.plan, all, backward));
}

// The steps of a chunk.
inline Range steps_of(int64_t chunk, const StackPlan& how, int64_t T) {
  return {chunk * how.chunk, std::min((chunk + 1) * how.chunk, T)};
}

// What a launch runs: as directions of one layer.
template <class Params, class Direction>
Params side_by_side(Params params, const std::vector<Direction>& layers) {
  params.stacked = true;
  params.directions = static_cast<int>(layers.size());
  std::copy(layers.begin(), layers.end(), params.direction);
  return params;
}

// Some rows of an input [N, I], or of its gradient.
inline void multiply_by_mask(const Layer& layer, Range rows, const Tensor& from, const Tensor& mask,
                             const Tensor& to) {
  multiply(from, mask, rows.begin * layer.I, (rows.end - rows.begin) * layer.I, to);
}

// A layer of a stack whose layers run side by side, a chunk of timesteps a launch.
class StackedLayer {
 public:
  // mask: on the output below, whose product with it is the layer's input; to be written yet.
  StackedLayer(std::unique_ptr<const Layer> layer, const OptionalTensor& mask, const Tensor& below,
               const FinalStates& final, bool save_gates, bool save_cells, int64_t chunk)
      : layer_(std::move(layer)),
        mask_(mask),
        below_(below),
        all_rows_(layer_->rnn() || save_gates),
        pass_(*layer_, save_gates, save_cells, true, final,
              all_rows_ ? layer_->N : first_row(std::min(chunk, layer_->shape.T))),
        carried_c_(layer_->allocate_if(layer_->lstm(), {layer_->shape.B, layer_->shape.H},
                                       layer_->cell_dtype())) {
    if (layer_->has_idle_sequences()) pass_.begin_final_states();
    pass_.zero_tails([&](const Tensor& t, int64_t matrices, int64_t columns) {
      zero_known_tail(*layer_, t, matrices, columns);
    });
  }

  const ForwardPass& pass() const { return pass_; }

  // Multiplies the input of these steps, and returns what the loop has to know of them. Where gates
  // are not saved there is room for those of a chunk; none has more rows than the first.
  ForwardDirection begin(Range steps) const {
    ForwardDirection own = pass_.params.direction[0];
    const Range rows = {first_row(steps.begin), first_row(steps.end)};
    own.first_row = all_rows_ ? 0 : rows.begin;
    if (mask_) multiply_by_mask(*layer_, rows, below_, *mask_, layer_->input);
    pass_.multiply_input(rows, own.first_row);
    own.steps_before = steps.begin;
    own.steps_after = layer_->shape.T - steps.end;
    if (steps.begin > 0) own.h0 = own.h_n;
    if (layer_->lstm()) own.carried_c = at(carried_c_, 0);
    return own;
  }

 private:
  // Of a timestep, or behind the last.
  int64_t first_row(int64_t t) const {
    return t < layer_->shape.T ? layer_->shape.row(t) : layer_->rows;
  }

  const std::unique_ptr<const Layer> layer_;
  const OptionalTensor mask_;
  const Tensor below_;
  const bool all_rows_;  // have their gates, or an RNN's pre-activations, all the time
  const ForwardPass pass_;
  const Tensor carried_c_;
};

// first: the stack's first layer.
inline StackResults run_side_by_side(const Stack& stack, std::unique_ptr<const Layer> first,
                                     const StackPlan& how, const FinalStates& final,
                                     Precision precision, bool save_gates, bool save_cells,
                                     cudaStream_t stream) {
  const int64_t T = first->shape.T, together = how.together;
  const DeviceRows rows(*first, stream);
  const Tensor scratch = stack_workspace(*first, how, false);
  StackResults results = {save_gates || save_cells, first->input};
  std::vector<std::unique_ptr<StackedLayer>> places(together);
  for (int64_t launch = 0; launch < how.launches(T, stack.layers()); ++launch) {
    std::vector<ForwardDirection> running;
    ForwardParams params{};
    for (int64_t place = 0; place < together; ++place) {
      const auto part = how.part(launch, place, T, stack.layers());
      if (!part) continue;
      const auto [l, chunk] = *part;
      if (chunk == 0) {
        const Tensor below = results.output;
        const OptionalTensor mask = l == 0 ? OptionalTensor() : stack.mask(l - 1, below);
        const Tensor input =
            mask ? allocate(below, {below.sizes().begin(), below.sizes().end()}) : below;
        auto layer = l == 0 ? std::move(first) : stack.layer(l, input);
        const FinalStates own = final.of(*layer, l);
        places[place] = std::make_unique<StackedLayer>(std::move(layer), mask, below, own,
                                                       save_gates, save_cells, how.chunk);
        results.add(places[place]->pass());
      }
      running.push_back(places[place]->begin(steps_of(chunk, how, T)));
      params = places[place]->pass().params;
    }
    persistent_forward(with_layers(how, running.size()), precision,
                       rows.with(side_by_side(params, running)), scratch.mutable_data_ptr(),
                       stream);
  }
  return results;
}

// As StackedLayer, backwards.
class StackedBackward {
 public:
  StackedBackward(std::unique_ptr<const Layer> layer, const OptionalTensor& mask,
                  const StateGradients& states, const Upstream& upstream, const Saved& saved,
                  Reuse reuse, bool need_input, bool need_weights)
      : layer_(std::move(layer)),
        mask_(mask),
        need_input_(need_input),
        need_weights_(need_weights),
        pass_(*layer_, states, upstream, saved, reuse, false),
        grads_(*layer_, pass_, need_weights) {
    pass_.carry();
  }

  // Makes a place for the gradient of the input. `above`: that of the output, if nobody else wants
  // it: a row of it is read before the same row of the input's gradient is written.
  void make_input(const OptionalTensor& above) {
    if (above)
      grads_.input = *above;
    else
      grads_.make_input(*layer_, pass_, need_input_);
  }

  Window begin(Range steps) const { return pass_.chunk(steps); }

  // Behind the loop of these steps.
  void end(Range steps, cudaStream_t stream) const {
    const Window window = begin(steps);
    if (need_input_) input_gradient(*layer_, pass_, window, grads_.input);
    if (mask_) multiply_by_mask(*layer_, window.rows[0], grads_.input, *mask_, grads_.input);
    if (steps.end < layer_->shape.T) return;
    pass_.spend_cells();
    if (need_input_ && layer_->rows < layer_->N)
      zero_known_tail(*layer_, grads_.input, 1, layer_->I);
    if (need_weights_) weight_gradients(*layer_, pass_, pass_.window(0), grads_, stream);
    pass_.spend_gates();
  }

  const Gradients& gradients() const { return grads_; }

 private:
  const std::unique_ptr<const Layer> layer_;
  const OptionalTensor mask_;  // on the output below
  const bool need_input_, need_weights_;
  BackwardPass pass_;
  Gradients grads_;
};

// last: the stack's last layer. Returns the gradients of each.
inline std::vector<Gradients> run_side_by_side(const StackBackward& stack,
                                               std::unique_ptr<const Layer> last,
                                               const StackPlan& how, const StateGradients& states,
                                               const OptionalTensor& grad_output,
                                               Precision precision, Reuse reuse, bool need_input,
                                               bool need_weights, cudaStream_t stream) {
  const int64_t T = last->shape.T, together = how.together;
  const DeviceRows rows(*last, stream);
  const Tensor scratch = stack_workspace(*last, how, true);
  std::vector<Gradients> results;
  std::vector<std::unique_ptr<StackedBackward>> places(together);
  for (int64_t launch = 0; launch < how.launches(T, stack.layers()); ++launch) {
    std::vector<BackwardDirection> running;
    std::vector<std::pair<int64_t, Range>> ends;  // of places
    BackwardParams params{};
    for (int64_t place = 0; place < together; ++place) {
      const auto part = how.part(launch, place, T, stack.layers());
      if (!part) continue;
      const int64_t l = stack.layers() - 1 - part->layer;
      const Range steps = steps_of(part->chunk, how, T);
      if (part->chunk == 0) {
        const bool top = results.empty();
        const OptionalTensor above =
            top ? grad_output : OptionalTensor(std::move(results[0].input));
        std::unique_ptr<const Layer> layer = last ? std::move(last) : stack.layer(l);
        const StateGradients own = states.of(*layer, l);
        places[place] = std::make_unique<StackedBackward>(std::move(layer), stack.mask(l), own,
                                                          stack.upstream(l, above), stack.saved(l),
                                                          reuse, l > 0 || need_input, need_weights);
        places[place]->make_input(top || l == 0 ? OptionalTensor() : above);
        results.insert(results.begin(), places[place]->gradients());
      }
      const Window window = places[place]->begin(steps);
      running.push_back(window.direction[0]);
      ends.emplace_back(place, steps);
      params = window;
    }
    persistent_backward(with_layers(how, running.size()), precision,
                        rows.with(side_by_side(params, running)), scratch.mutable_data_ptr(),
                        stream);
    for (const auto& [place, steps] : ends) {
      places[place]->end(steps, stream);
      if (steps.end == T) places[place].reset();  // and what it has in memory
    }
  }
  return results;
}

}  // namespace rnn_fused
