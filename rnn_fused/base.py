"""What LSTM, GRU and RNN share: the layouts of input and states, layers, checks.

Axes: T steps, B batch, I input size, H hidden size, P = `proj_size` or H, L layers,
D directions (2 if bidirectional), N = sum of the lengths of packed sequences.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.rnn import RNNBase
from torch.nn.utils.rnn import PackedSequence

from . import ops
from .ops import CellOptions, LayerWeights
from .ragged import check_lengths, ragged

Hidden: TypeAlias = Tensor | tuple[Tensor, Tensor]

INITIAL_STATES = ("initial_h", "initial_c")
OWN_OPTIONS: dict[str, Any] = {  # which torch.nn lacks, and their defaults
    "learn_initial_state": False,
    "batch_first_states": False,
    "gate_slope": 1.0,
    "cell_clip": None,
    "grad_clip_value": None,
    "save": "gates",
}


class FusedRNNBase(RNNBase):
    """What the three modules share: everything but the form of their state.

    Construction, parameters, initialisation and pickling are those of `torch.nn.RNNBase`. The
    base is not `torch.nn.LSTM` (GRU, RNN) itself, since Dynamo breaks the graph at those.

    Weights are read by attribute on every call, so that parametrisations, `functional_call` and
    hooks that set a weight take effect; the list `_flat_weights` is kept up by `RNNBase` only.
    """

    # Also what a module has that came from torch.nn, or from an older pickle.
    learn_initial_state: bool = False
    batch_first_states: bool = False
    gate_slope: float = 1.0
    cell_clip: float | None = None
    grad_clip_value: float | None = None
    save: str = "gates"
    _packed: list[Tensor] | None = None  # the weights of each layer, in frozen modules

    def __init__(self, mode: str, *args: Any, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name, default) for name, default in OWN_OPTIONS.items()}
        refusal = ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        if "proj_size" in kwargs and mode != "LSTM":
            raise refusal
        super().__init__(mode, *args, **kwargs)
        if self.proj_size > 0 and mode != "LSTM":  # given by position
            raise refusal
        _check_options(options, mode, self.batch_first)
        for name, option in options.items():
            setattr(self, name, option)
        if self.learn_initial_state:
            weight = self._weights_by_layer()[0].weight_hh[0]
            for name, (rows, _, width) in zip(INITIAL_STATES, self._state_sizes(1), strict=False):
                setattr(self, name, nn.Parameter(weight.new_zeros(rows, width)))

    def reset_parameters(self) -> None:
        """Draws the weights as torch.nn does, from the same random numbers; learned initial states
        become zero."""
        bound = 1 / math.sqrt(self.hidden_size)
        for name, parameter in self.named_parameters():
            if name in INITIAL_STATES:
                nn.init.zeros_(parameter)
            else:
                nn.init.uniform_(parameter, -bound, bound)

    def extra_repr(self) -> str:
        given = {name: getattr(self, name) for name in OWN_OPTIONS}
        others = (f", {k}={v!r}" for k, v in given.items() if v != OWN_OPTIONS[k])
        return super().extra_repr() + "".join(others)

    def forward(
        self,
        input: PackedSequence | Tensor,
        hx: Hidden | None = None,
        *,
        lengths: Tensor | None = None,
        resets: PackedSequence | Tensor | None = None,
        reset_state: Hidden | None = None,
        return_all_states: bool = False,
    ) -> Any:
        """Runs the sequences. Inputs, results and errors are those of the class's description."""
        if reset_state is not None and resets is None:
            raise ValueError(f"{type(self).__name__}: reset_state needs resets, got none")
        if lengths is not None:
            self._check_padded(input)
        packed, rank = (True, 3) if isinstance(input, PackedSequence) else (False, input.dim())
        if rank not in (2, 3):
            name = type(self).__name__
            raise ValueError(f"{name}: Expected input to be 2D or 3D, got {rank}D instead")
        states = None if hx is None else self._read_state(hx, packed, rank)
        rows = reset_states = None
        if resets is not None:
            if reset_state is not None:
                reset_states = self._read_state(reset_state, packed, rank, "reset_state")
            rows = self._read_resets(resets, input)
        if isinstance(input, PackedSequence):
            output, states, layers = self._run_packed(
                input, states, rows, reset_states, return_all_states
            )
        elif lengths is not None:
            output, states, layers = self._run_padded(
                input, lengths, states, rows, reset_states, return_all_states
            )
        else:
            sequence = input.unsqueeze(1) if rank == 2 else self._time_first(input)
            output, states, layers = self._run(
                sequence, states, sequence.size(1), None, rows, reset_states, return_all_states
            )
        if rank == 2:
            states = tuple(state.squeeze(1) for state in states)
        elif self.batch_first_states:
            states = tuple(state.transpose(0, 1) for state in states)
        result = self._in_form_of(input, output), self._join_state(states)
        if not return_all_states:
            return result
        every = [[self._in_form_of(input, state) for state in layer] for layer in layers]
        return *result, tuple(self._join_state(tuple(layer)) for layer in every)

    def _in_form_of(self, input: PackedSequence | Tensor, rows: Tensor) -> Any:
        """rows: [T, B, ...], or packed [N, ...]."""
        if isinstance(input, PackedSequence):
            return PackedSequence(rows, *input[1:])
        return rows.squeeze(1) if input.dim() == 2 else self._time_first(rows)

    def _time_first(self, sequence: Tensor) -> Tensor:
        """From the layout of a batched input, and back."""
        return sequence.transpose(0, 1) if self.batch_first else sequence

    def _read_state(
        self, hx: Hidden, packed: bool, rank: int, what: str = "hx"
    ) -> tuple[Tensor, ...]:
        """As (h,) or (h, c), [L*D, B, ...]. rank: of an input with as many sequences, 2 of one."""
        states = self._split_state(hx, packed, what)
        if not packed or self.batch_first_states:
            self._check_state_rank(states, rank, what)
        if rank == 2:
            return tuple(state.unsqueeze(1) for state in states)
        if self.batch_first_states:
            return tuple(state.transpose(0, 1) for state in states)
        return states

    def _read_resets(
        self, resets: PackedSequence | Tensor, input: PackedSequence | Tensor
    ) -> Tensor:
        """As [T, B], or packed [N]."""
        name = type(self).__name__
        if isinstance(input, PackedSequence) and isinstance(resets, PackedSequence):
            for what in ("batch_sizes", "sorted_indices"):
                expected, given = getattr(input, what), getattr(resets, what)
                if expected is None or given is None or torch.compiler.is_compiling():
                    continue
                # On a device the comparison would have to wait for it.
                if given.is_cpu and expected.is_cpu and not torch.equal(given, expected):
                    raise RuntimeError(
                        f"{name}: resets must have the {what} of input, {expected.tolist()}, "
                        f"got {given.tolist()}"
                    )
            return resets.data
        if isinstance(input, PackedSequence) or not isinstance(resets, Tensor):
            form = "PackedSequence" if isinstance(input, PackedSequence) else "Tensor"
            raise TypeError(
                f"{name}: resets must be a {form}, as input is, got {type(resets).__name__}"
            )
        shape, got = list(input.shape[:-1]), list(resets.shape)
        if got != shape:
            axes = "[T]" if input.dim() == 2 else "[B, T]" if self.batch_first else "[T, B]"
            raise RuntimeError(f"{name}: resets must have shape {axes} = {shape}, got {got}")
        if input.dim() == 2:
            return resets.unsqueeze(1)
        return self._time_first(resets)

    def step(
        self,
        input: Tensor,
        state: Hidden | None = None,
        *,
        resets: Tensor | None = None,
        reset_state: Hidden | None = None,
    ) -> tuple[Tensor, Any]:
        """Runs all layers over the next timestep of a stream; equals `forward` over a sequence
        of that one step.

        Args:
            input: x of this step, [B, I]; of a single stream also [I].
            state: the state before the step, in the form of `forward`'s hx (for [I], without the B
                axis). None begins a stream, as in `forward`.
            resets: bool [B], or [] of a single stream: which streams begin anew with this step.
            reset_state: the state in which they begin, in the form of `state`; None: what was
                learned, or zero. Needs resets.

        Returns:
            output [B, D*P] or [D*P], and the state after the step, for the next call.

        Raises:
            ValueError: the module is bidirectional; input not 1-D or 2-D.
            Else as `forward`.
        """
        name = type(self).__name__
        if self.bidirectional:
            raise ValueError(
                f"{name}: step needs bidirectional=False, since the reverse direction begins at "
                "the end of the sequence; got bidirectional=True"
            )
        if input.dim() not in (1, 2):
            raise ValueError(
                f"{name}: step expects input to be 1D or 2D, [B, I] or [I], got {input.dim()}D "
                "instead"
            )
        time = 1 if self.batch_first and input.dim() == 2 else 0
        if resets is not None:
            shape = list(input.shape[:-1])
            if not isinstance(resets, Tensor):
                raise TypeError(f"{name}: resets must be a Tensor, got {type(resets).__name__}")
            if list(resets.shape) != shape:
                raise RuntimeError(
                    f"{name}: resets of a step must have shape {shape}, got {list(resets.shape)}"
                )
            resets = resets.unsqueeze(time)
        output, state = self(input.unsqueeze(time), state, resets=resets, reset_state=reset_state)
        return output.squeeze(time), state

    def flatten_parameters(self) -> None:
        """Does nothing: the kernels read the weights where they are."""

    def _run_packed(
        self,
        input: PackedSequence,
        states: tuple[Tensor, ...] | None,
        resets: Tensor | None,
        reset_states: tuple[Tensor, ...] | None,
        all_states: bool,
    ) -> tuple[Tensor, tuple[Tensor, ...], list[tuple[Tensor, ...]]]:
        data, batch_sizes, sorted_indices, unsorted_indices = input
        # A traced graph cannot compare the values in batch_sizes with a shape; the op does.
        if sorted_indices is not None:
            batch = sorted_indices.size(0)
        elif states is not None and torch.compiler.is_compiling():
            batch = states[0].size(1)
        else:
            batch = int(batch_sizes[0])
        if sorted_indices is not None:
            if states is not None:
                # Indices would accept L*D > B sequences, as in torch.nn.
                if self.batch_first_states:
                    self._check_states(states, batch)
                states = tuple(state.index_select(1, sorted_indices) for state in states)
            if reset_states is not None:
                self._check_states(reset_states, batch, "reset_state")
                reset_states = tuple(s.index_select(1, sorted_indices) for s in reset_states)
        output, states, layers = self._run(
            data, states, batch, batch_sizes, resets, reset_states, all_states
        )
        if unsorted_indices is not None:
            states = tuple(state.index_select(1, unsorted_indices) for state in states)
        return output, states, layers

    def _check_padded(self, input: PackedSequence | Tensor) -> None:
        """That lengths may come with this input."""
        name = type(self).__name__
        if isinstance(input, PackedSequence):
            raise TypeError(
                f"{name}: lengths need input to be a padded batch, a Tensor, got a PackedSequence, "
                "which has its own"
            )
        if input.dim() == 2:
            raise ValueError(
                f"{name}: lengths need input to be batched, 3D, got unbatched 2D input"
            )

    def _run_padded(
        self,
        input: Tensor,
        lengths: Tensor,
        states: tuple[Tensor, ...] | None,
        resets: Tensor | None,
        reset_states: tuple[Tensor, ...] | None,
        all_states: bool,
    ) -> tuple[Tensor, tuple[Tensor, ...], list[tuple[Tensor, ...]]]:
        """`_run` over sequences of different lengths, [T, B, I] or as batch_first says."""
        sequence = self._time_first(input)
        self._check_sequence(sequence, None, self.weight_ih_l0)  # type: ignore[arg-type]
        batch = sequence.size(1)
        if states is not None:
            self._check_states(states, batch)
        if reset_states is not None:
            self._check_states(reset_states, batch, "reset_state")
        check_lengths(lengths, sequence.size(0), batch, type(self).__name__)
        if ops.takes_lengths(input, lengths):
            lengths = lengths.to(torch.int64, copy=True)  # the caller's may change before backward
            return self._run(
                sequence, states, batch, None, resets, reset_states, all_states, lengths
            )
        rows = ragged(lengths, input, self.batch_first)
        output, final, layers = self._run(
            rows.pack(input),
            None if states is None else tuple(map(rows.sort, states)),
            batch,
            rows.batch_sizes,
            None if resets is None else rows.pack_flags(self._time_first(resets)),
            None if reset_states is None else tuple(map(rows.sort, reset_states)),
            all_states,
        )
        every = [tuple(self._time_first(rows.unpack(state)) for state in layer) for layer in layers]
        # The last layer's h is among them.
        output = every[-1][0] if all_states else self._time_first(rows.unpack(output))
        return output, tuple(map(rows.unsort, final)), every

    def _run(
        self,
        sequence: Tensor,
        states: tuple[Tensor, ...] | None,
        batch: int,
        batch_sizes: Tensor | None,
        resets: Tensor | None,
        reset_states: tuple[Tensor, ...] | None,
        all_states: bool,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...], list[tuple[Tensor, ...]]]:
        """Runs all layers over a sequence [T, B, I], or packed [N, I]; each state [L*D, B, P or H];
        resets [T, B], or packed [N]. lengths: of [T, B, I], where `ops.takes_lengths`. The third
        result: with all_states the states after every step, of each layer.

        Dropout falls on the output of each layer but the last, in the layout in which torch.nn
        applies it: the same seed gives the same mask.
        """
        packed = self._packed
        weights = [] if packed else self._weights_by_layer()
        first = packed[0] if packed else weights[0].weight_ih[0]
        self._check_sequence(sequence, batch_sizes, first)
        if states is not None:
            self._check_states(states, batch)
        elif batch_sizes is not None or self.learn_initial_state:
            states = self._initial_states(sequence, batch)
        if reset_states is not None:
            self._check_states(reset_states, batch, "reset_state")
        elif resets is not None and self.learn_initial_state:
            reset_states = self._initial_states(sequence, batch)

        cell, options = self.mode.lower(), self._cell_options()
        recompute = _recomputes(self.save)
        drops = self.training and self.dropout > 0
        rows: Any = {"batch_sizes": batch_sizes, "lengths": lengths, "resets": resets}
        if packed:
            primals = sequence, *(states or ()), *(reset_states or ())
            if not all_states and ops.runs_packed(*primals):
                output, last = ops.packed_stack(
                    sequence,
                    states,
                    packed,
                    cell=cell,
                    hidden_size=self.hidden_size,
                    output_size=self.proj_size or self.hidden_size,
                    reset_states=reset_states,
                    options=options,
                    **rows,
                )
                return output, last, []
            weights = self._weights_by_layer()
        if self.num_layers > 1 and not all_states and ops.runs_stack(sequence, weights):
            output, last = ops.stack(
                *(sequence, states, weights),
                cell=cell,
                reset_states=reset_states,
                options=options,
                dropout=self.dropout if drops else 0,
                recompute=recompute,
                **rows,
            )
            return output, last, []
        absent = [(None, None)] * len(weights)
        initial = absent if states is None else _by_layer(states, len(weights))
        after_reset = absent if reset_states is None else _by_layer(reset_states, len(weights))
        final: list[tuple[Tensor, ...]] = []
        layers: list[tuple[Tensor, ...]] = []
        for layer, layer_weights in enumerate(weights):
            if layer > 0 and drops:
                sequence = F.dropout(sequence, self.dropout)
            hx, cx = initial[layer]
            reset_hx, reset_cx = after_reset[layer]
            sequence, h_n, c_n, cells = ops.run_layer(
                sequence,
                hx,
                cx,
                layer_weights,
                cell=cell,
                reset_hx=reset_hx,
                reset_cx=reset_cx,
                options=options,
                all_cells=all_states and cell == "lstm",
                recompute=recompute,
                **rows,
            )
            final.append((h_n,) if c_n is None else (h_n, c_n))
            if all_states:
                layers.append((sequence,) if cells is None else (sequence, cells))
        if len(final) == 1:
            return sequence, final[0], layers
        return sequence, tuple(torch.cat(states) for states in zip(*final, strict=True)), layers

    def _cell_options(self) -> CellOptions:
        return CellOptions(self.gate_slope, self.cell_clip, self.grad_clip_value)

    def _weights_by_layer(self) -> list[LayerWeights]:
        names = self._flat_weights_names  # layer by layer, direction by direction, as in torch.nn
        # By attribute, but looked for first where it mostly is: `getattr` looks there last.
        here: dict[str, Any] = {} if torch.compiler.is_compiling() else self._parameters
        flat = [here[name] if name in here else getattr(self, name) for name in names]
        size = len(flat) // self.num_layers
        layers = []
        for first in range(0, len(flat), size):
            layer = flat[first : first + size]
            fields: list[Any] = [(weight,) for weight in layer]
            if self.bidirectional:
                fields = [*zip(layer[: size // 2], layer[size // 2 :], strict=True)]
            if not self.bias:
                fields[2:2] = (), ()
            layers.append(LayerWeights(*fields))
        return layers

    def _initial_states(self, sequence: Tensor, batch: int) -> tuple[Tensor, ...]:
        """The states where none are given: the learned ones, else zeros."""
        sizes = self._state_sizes(batch)
        if self.learn_initial_state:
            learned = (getattr(self, name) for name in INITIAL_STATES[: len(sizes)])
            return tuple(s.unsqueeze(1).expand(z) for s, z in zip(learned, sizes, strict=True))
        return tuple(sequence.new_zeros(size) for size in sizes)

    def _split_state(self, hx: Hidden, packed: bool, what: str = "hx") -> tuple[Tensor, ...]:
        """The state as a tuple, (h,) or (h, c); `packed` tells how the input comes."""
        if not isinstance(hx, Tensor):
            name = type(self).__name__
            raise AttributeError(f"{name}: {what} must be a Tensor, got {type(hx).__name__}")
        return (hx,)

    def _join_state(self, states: tuple[Tensor, ...]) -> Hidden:
        return states[0]

    def _state_sizes(self, batch: int) -> tuple[tuple[int, int, int], ...]:
        """Of h, and of the c of an LSTM."""
        count = self.num_layers * (2 if self.bidirectional else 1)
        h = count, batch, self.proj_size or self.hidden_size
        return (h, (count, batch, self.hidden_size)) if self.mode == "LSTM" else (h,)

    def _check_sequence(self, sequence: Tensor, batch_sizes: Tensor | None, weight: Tensor) -> None:
        packed, shape = batch_sizes is not None, sequence.shape
        if sequence.device != weight.device:
            raise RuntimeError(
                "Input and parameter tensors are not at the same device, found input tensor at "
                f"{sequence.device} and parameter tensor at {weight.device}"
            )
        if sequence.dtype != weight.dtype and not torch._C._is_any_autocast_enabled():
            # torch.nn.LSTM leaves packed input to its op, whose error is a RuntimeError.
            error = RuntimeError if packed and self.mode == "LSTM" else ValueError
            raise error(
                f"RNN input dtype ({sequence.dtype}) does not match weight dtype ({weight.dtype}). "
                f"Convert input: input.to({weight.dtype}), "
                f"or convert model: model.to({sequence.dtype})"
            )
        rank = 2 if packed else 3
        if len(shape) != rank:
            raise RuntimeError(f"input must have {rank} dimensions, got {len(shape)}")
        if shape[-1] != self.input_size:
            raise RuntimeError(
                "input.size(-1) must be equal to input_size. "
                f"Expected {self.input_size}, got {shape[-1]}"
            )
        if not packed and shape[0] == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN, got 0")

    def _check_state_rank(self, states: tuple[Tensor, ...], rank: int, what: str = "hx") -> None:
        if {state.dim() for state in states} == {rank}:
            return
        batched = "batched" if rank == 3 else "unbatched"
        name = "hx and cx" if what == "hx" and len(states) == 2 else what
        got = " and ".join(f"{state.dim()}-D" for state in states)
        raise RuntimeError(
            f"For {batched} {rank}-D input, {name} should also be {rank}-D but got {got}"
        )

    def _check_states(
        self,
        states: tuple[Tensor, ...],
        batch: int,
        what: str = "hidden",
    ) -> None:
        for index, size in enumerate(self._state_sizes(batch)):
            if states[index].shape != size:
                name = what if len(states) == 1 else f"{what}[{index}]"
                got = list(states[index].shape)
                if self.batch_first_states:
                    size, got = (size[1], size[0], size[2]), [got[1], got[0], got[2]]
                raise RuntimeError(f"Expected {name} size {size}, got {got}")


def _check_options(options: dict[str, Any], mode: str, batch_first: bool) -> None:
    for name in ("learn_initial_state", "batch_first_states"):
        if not isinstance(options[name], bool):
            raise TypeError(f"{name} should be of type bool, got: {type(options[name]).__name__}")
    if options["batch_first_states"] and not batch_first:
        raise ValueError("batch_first_states=True needs batch_first=True, got batch_first=False")
    for name in ("gate_slope", "cell_clip", "grad_clip_value"):
        value = options[name]
        if value is None and OWN_OPTIONS[name] is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} should be a number, got: {type(value).__name__}")
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")
    if options["gate_slope"] != 1 and mode.startswith("RNN"):
        value = options["gate_slope"]
        raise ValueError(f"gate_slope needs the gates of an LSTM or GRU, not RNN, got {value}")
    if options["cell_clip"] is not None and mode != "LSTM":
        value, kind = options["cell_clip"], mode.split("_")[0]
        raise ValueError(f"cell_clip needs the c of an LSTM, not {kind}, got {value}")
    _recomputes(options["save"])


def _recomputes(save: str) -> bool:
    if save not in ("gates", "recompute"):
        raise ValueError(f"save must be 'gates' or 'recompute', got {save!r}")
    return save == "recompute"


def _by_layer(states: tuple[Tensor, ...], layers: int) -> list[Any]:
    """(hx, cx) of each layer, cx None where absent; states: of all layers."""
    h, c, *_ = *states, None
    if layers == 1:
        return [(h, c)]
    cs = [None] * layers if c is None else c.chunk(layers)
    return [*zip(h.chunk(layers), cs, strict=True)]
