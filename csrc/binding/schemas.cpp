// Every operator's schema. The implementations are registered beside their code.
//
// D directions, G gates, P the size of h; weight lists have D entries, or none where absent.
#include "csrc/binding/compat.h"

#define RNN_FUSED_PRIMALS                                                           \
  "Tensor input, Tensor? hx, Tensor? cx, Tensor? reset_hx, Tensor? reset_cx, "      \
  "Tensor[] weight_ih, Tensor[] weight_hh, Tensor[] bias_ih, Tensor[] bias_hh, "    \
  "Tensor[] weight_hr, Tensor? sizes, Tensor? resets, str cell, float gate_slope, " \
  "float? cell_clip, float? grad_clip_value, str kernels, bool allow_tf32, "
#define RNN_FUSED_GRADIENTS                                                        \
  ", bool need_input, bool need_state, bool need_weights) -> (Tensor grad_input, " \
  "Tensor grad_hx, Tensor grad_cx, Tensor grad_reset_hx, Tensor grad_reset_cx, "   \
  "Tensor[] grad_weights)"
#define RNN_FUSED_LAYER_BACKWARD(name, gates)                               \
  name "(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor? " \
       "grad_cells, " RNN_FUSED_PRIMALS "Tensor output, " gates             \
       ", Tensor cells" RNN_FUSED_GRADIENTS
#define RNN_FUSED_STACK_BACKWARD(name, saved)                                         \
  name "(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, " RNN_FUSED_PRIMALS \
       "int layers, Tensor[] masks, Tensor output, Tensor[] below, " saved RNN_FUSED_GRADIENTS

#ifdef RNN_FUSED_EMULATION
STABLE_TORCH_LIBRARY(rnn_fused_emulated, m) {
#else
STABLE_TORCH_LIBRARY(rnn_fused, m) {
#endif
  // input [T, B, I] or packed [N, I]; hx [D, B, P]; cx [D, B, H]; weight_ih [G*H, I], weight_hh
  // [G*H, P], bias_* [G*H], weight_hr [P, H]. Without hx and cx, [T, B, I] begins with zeros.
  // sizes: of packed input its batch_sizes [T], on the CPU or its own device. Of [T, B, I], on the
  // CPU only, the lengths [B] of its sequences: output and grad_input are zero behind their ends.
  // resets: bool [T, B] or packed [N]; after one the state is reset_hx and reset_cx, of the shapes
  // of hx and cx, or zero.
  // -> output, h_n, c_n, and for the backward pass gates [D, N, 4, H] and cells [D, N, H], always
  // packed, with shape [0] where not to be saved: it needs the cells, and rebuilds gates that it is
  // not given.
  // gate_slope: gates are sigmoid(gate_slope * x). |c| is at most cell_clip. grad_clip_value bounds
  // the gradients of h and c that leave a step backwards. kernels (auto, stepwise, persistent,
  // handoff, split or cluster) is for CUDA. allow_tf32: float32 products may be less exact, in TF32
  // or, on a CPU with AMX, of two bfloat16 terms. No defaults: what register_autograd is given
  // would depend on whether the caller leaves them out.
  m.def("layer_forward(" RNN_FUSED_PRIMALS
        "bool save_gates, bool save_cells) "
        "-> (Tensor output, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells)");
  // All layers of a stack. Lists have D tensors a layer, layer by layer, and states are those of
  // all layers, [L*D, B, ...]. masks: by which the outputs of all layers but the last are
  // multiplied on their way up, if given. The rest is layer_forward's. For the backward pass also
  // the outputs of the layers below the last, and gates and cells of each, where any are saved.
  m.def("stack_forward(" RNN_FUSED_PRIMALS
        "int layers, Tensor[] masks, bool save_gates, bool save_cells) "
        "-> (Tensor output, Tensor h_n, Tensor c_n, Tensor[] below, Tensor[] gates, "
        "Tensor[] cells)");
  // The same on the CPU, where each layer's weights and biases were packed once for many calls, [D,
  // values], in a layout that is that of this processor's instructions. hidden_size and output_size
  // are H and P.
  m.def(
      "pack_weights(Tensor[] weight_ih, Tensor[] weight_hh, Tensor[] bias_ih, Tensor[] bias_hh, "
      "Tensor[] weight_hr, str cell) -> Tensor");
  m.def(
      "stack_infer(Tensor input, Tensor? hx, Tensor? cx, Tensor? reset_hx, Tensor? reset_cx, "
      "Tensor[] packed, Tensor? sizes, Tensor? resets, str cell, int hidden_size, "
      "int output_size, float gate_slope, float? cell_clip) "
      "-> (Tensor output, Tensor h_n, Tensor c_n)");
  // -> the gradients, with shape [0] where not needed; grad_weights in the order of the arguments.
  // layer_backward_ leaves the gradients of the pre-activations in the place of gates: the memory
  // of one such tensor less. Of a stack, grad_output is that of its last layer; stack_backward_
  // leaves gates and cells without values or memory, which it gives back as soon as nothing reads
  // it.
  m.def(RNN_FUSED_LAYER_BACKWARD("layer_backward", "Tensor gates"));
  m.def(RNN_FUSED_LAYER_BACKWARD("layer_backward_", "Tensor(a!) gates"));
  m.def(RNN_FUSED_STACK_BACKWARD("stack_backward", "Tensor[] gates, Tensor[] cells"));
  m.def(RNN_FUSED_STACK_BACKWARD("stack_backward_", "Tensor(a!)[] gates, Tensor(b!)[] cells"));
  // The architecture that the loaded kernels were compiled for, on the device of the tensor.
  m.def("cuda_probe(Tensor device_of) -> int");
}
