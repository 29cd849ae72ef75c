"""ONNX Runtime's recurrent layers, which only infer, with the weights of torch.nn's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .problems import Problem

# torch.nn's blocks of weights in the order of ONNX: LSTM (i, o, f, g), GRU (z, r, n).
ORDER = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2), "rnn_tanh": (0,), "rnn_relu": (0,)}
OPSET, IR_VERSION = 14, 8  # of the operators; of the file format, read by every later runtime


class OnnxRuntimeLayer(nn.Module):
    """Runs `cell`, a layer of torch.nn, in ONNX Runtime on the CPU."""

    def __init__(self, problem: Problem, cell: nn.Module) -> None:
        """Take the parameters as they are at the first call."""
        super().__init__()
        self.cell = cell
        self.problem = problem
        self.session: Any = None

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        """Run [T, B, I] -> [T, B, H] and the last state, shaped as torch.nn shapes it."""
        if self.session is None:
            self.session = self._session()
        outputs = self.session.run(None, {"x": x.numpy()})
        output, *state = map(torch.from_numpy, outputs)
        return output.squeeze(1), tuple(state) if len(state) > 1 else state[0]

    def _session(self) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        # Its threads would spin on into the others' turns.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        return onnxruntime.InferenceSession(
            self._model().SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def _model(self) -> Any:
        from onnx import TensorProto, helper, numpy_helper

        problem = self.problem
        lstm, gru = problem.cell == "lstm", problem.cell == "gru"
        attributes: dict[str, Any] = {"hidden_size": problem.H}
        if gru:
            attributes["linear_before_reset"] = 1
        elif not lstm:
            attributes["activations"] = [problem.cell.removeprefix("rnn_").capitalize()]
        weights = {"w": self._blocks("weight_ih"), "r": self._blocks("weight_hh")}
        weights["b"] = torch.cat([self._blocks("bias_ih"), self._blocks("bias_hh")], dim=1)
        outputs = ["y", "y_h", "y_c"][: 3 if lstm else 2]
        kind = "RNN" if problem.cell.startswith("rnn_") else problem.cell.upper()
        node = helper.make_node(kind, ["x", *weights], outputs, **attributes)
        value = helper.make_tensor_value_info
        graph = helper.make_graph(
            [node],
            "layer",
            [value("x", TensorProto.FLOAT, [problem.T, problem.B, problem.I])],
            [value(name, TensorProto.FLOAT, None) for name in outputs],
            [numpy_helper.from_array(w.numpy(), name) for name, w in weights.items()],
        )
        opset = helper.make_opsetid("", OPSET)
        return helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION)

    def _blocks(self, name: str) -> Tensor:
        """A parameter as ONNX has it: [directions, G*H, ...]."""
        blocks = getattr(self.cell, f"{name}_l0").detach().split(self.problem.H)
        return torch.cat([blocks[k] for k in ORDER[self.problem.cell]]).unsqueeze(0)
