// In place of the kernels of an instruction set that a build of the tests leaves out
// (CMakeLists.txt). RNN_FUSED_ISA names it.
#pragma once

#include <cstdlib>

#include "csrc/cpu/cpu.h"

namespace rnn_fused::RNN_FUSED_ISA {

void forward(const ForwardParams&, const Schedule&, const Host&) { std::abort(); }
void forward_stack(const StackParams&, const Schedule&, const Host&) { std::abort(); }
void backward(const BackwardParams&, const Schedule&, const Host&) { std::abort(); }
void gates(const GatesParams&, const Host&) { std::abort(); }
void input_gradient(const InputGradientParams&, const Host&) { std::abort(); }
void outer_product(const OuterProductParams&, const Host&) { std::abort(); }
int64_t pack_weights(const PackParams&, void*) { std::abort(); }

}  // namespace rnn_fused::RNN_FUSED_ISA
