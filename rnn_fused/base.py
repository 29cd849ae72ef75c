"""What LSTM, GRU and RNN share: the layouts of input and states, layers, checks.

Axes: T steps, B batch, I input size, H hidden size, P = `proj_size` or H, L layers,
D directions (2 if bidirectional), N = sum of the lengths of packed sequences.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.rnn import RNNBase
from torch.nn.utils.rnn import PackedSequence

from . import ops
from .ops import LayerWeights
from .ragged import ragged

Hidden: TypeAlias = Tensor | tuple[Tensor, Tensor]

INITIAL_STATES = ("initial_h", "initial_c")
OWN_OPTIONS = ("learn_initial_state", "batch_first_states")  # which torch.nn lacks


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

    def __init__(
        self,
        mode: str,
        *args: Any,
        learn_initial_state: bool = False,
        batch_first_states: bool = False,
        **kwargs: Any,
    ) -> None:
        refusal = ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        if "proj_size" in kwargs and mode != "LSTM":
            raise refusal
        super().__init__(mode, *args, **kwargs)
        if self.proj_size > 0 and mode != "LSTM":  # given by position
            raise refusal
        given = (learn_initial_state, batch_first_states)
        for name, option in zip(OWN_OPTIONS, given, strict=True):
            if not isinstance(option, bool):
                raise TypeError(f"{name} should be of type bool, got: {type(option).__name__}")
            setattr(self, name, option)
        if batch_first_states and not self.batch_first:
            raise ValueError(
                "batch_first_states=True needs batch_first=True, got batch_first=False"
            )
        if learn_initial_state:
            weight = self._layer_weights(0).weight_hh[0]
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
        given = "".join(f", {name}=True" for name in OWN_OPTIONS if getattr(self, name))
        return super().extra_repr() + given

    def forward(
        self,
        input: PackedSequence | Tensor,
        hx: Hidden | None = None,
        *,
        lengths: Tensor | None = None,
        resets: PackedSequence | Tensor | None = None,
        reset_state: Hidden | None = None,
    ) -> Any:
        if reset_state is not None and resets is None:
            raise ValueError(f"{type(self).__name__}: reset_state needs resets, got none")
        if lengths is not None:
            self._check_padded(input)
        packed = isinstance(input, PackedSequence)
        batched = isinstance(input, PackedSequence) or input.dim() == 3
        states = self._read_state(hx, packed, batched)
        reset_states = self._read_state(reset_state, packed, batched, "reset_state")
        rows = None if resets is None else self._read_resets(resets, input)
        output: PackedSequence | Tensor
        if isinstance(input, PackedSequence):
            output, states = self._run_packed(input, states, rows, reset_states)
        elif input.dim() == 2:
            self._check_state_rank(states, 2)
            self._check_state_rank(reset_states, 2, "reset_state")
            states, reset_states = (
                None if given is None else tuple(state.unsqueeze(1) for state in given)
                for given in (states, reset_states)
            )
            output, states = self._run(input.unsqueeze(1), states, 1, None, rows, reset_states)
            output = output.squeeze(1)
            states = tuple(state.squeeze(1) for state in states)
        elif input.dim() == 3:
            self._check_state_rank(states, 3)
            self._check_state_rank(reset_states, 3, "reset_state")
            sequence = input.transpose(0, 1) if self.batch_first else input
            batch = sequence.size(1)
            if lengths is not None:
                output, states = self._run_padded(sequence, lengths, states, rows, reset_states)
            else:
                output, states = self._run(sequence, states, batch, None, rows, reset_states)
                output = output.transpose(0, 1) if self.batch_first else output
        else:
            name = type(self).__name__
            raise ValueError(f"{name}: Expected input to be 2D or 3D, got {input.dim()}D instead")
        if self.batch_first_states and batched:
            states = tuple(state.transpose(0, 1) for state in states)
        return output, self._join_state(states)

    def _read_state(
        self, hx: Hidden | None, packed: bool, batched: bool, what: str = "hx"
    ) -> tuple[Tensor, ...] | None:
        """As (h,) or (h, c), not with the batch first. `packed`, `batched`: how the input comes."""
        if hx is None:
            return None
        states = self._split_state(hx, packed, what)
        if self.batch_first_states and batched:
            self._check_state_rank(states, 3, what)
            states = tuple(state.transpose(0, 1) for state in states)
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
        return resets.transpose(0, 1) if self.batch_first else resets

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
            resets: bool [B], or [] of a single stream: which streams begin anew with this step, in
                reset_state, as in `forward`.

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
    ) -> tuple[PackedSequence, tuple[Tensor, ...]]:
        data, batch_sizes, sorted_indices, unsorted_indices = input
        # A traced graph cannot compare the values in batch_sizes with a shape; the op does.
        if sorted_indices is not None:
            batch = sorted_indices.size(0)
        elif states is not None and torch.compiler.is_compiling():
            batch = states[0].size(1)
        else:
            batch = int(batch_sizes[0])
        if sorted_indices is not None:
            sizes = self._state_sizes(batch)
            if states is not None:
                # Indices would accept L*D > B sequences, as in torch.nn.
                if self.batch_first_states:
                    self._check_states(states, sizes)
                states = tuple(state.index_select(1, sorted_indices) for state in states)
            if reset_states is not None:
                self._check_states(reset_states, sizes, "reset_state")
                reset_states = tuple(s.index_select(1, sorted_indices) for s in reset_states)
        output, states = self._run(data, states, batch, batch_sizes, resets, reset_states)
        if unsorted_indices is not None:
            states = tuple(state.index_select(1, unsorted_indices) for state in states)
        return PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices), states

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
        sequence: Tensor,
        lengths: Tensor,
        states: tuple[Tensor, ...] | None,
        resets: Tensor | None,
        reset_states: tuple[Tensor, ...] | None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """`_run` over sequences of different lengths; the output has the layout of the input."""
        self._check_sequence(sequence, None, self.weight_ih_l0)  # type: ignore[arg-type]
        batch = sequence.size(1)
        sizes = self._state_sizes(batch)
        if states is not None:
            self._check_states(states, sizes)
        if reset_states is not None:
            self._check_states(reset_states, sizes, "reset_state")
        if self.batch_first:  # as it lies in memory
            sequence = sequence.transpose(0, 1)
            resets = None if resets is None else resets.transpose(0, 1)
        rows = ragged(lengths, sequence, self.batch_first, type(self).__name__)
        output, final = self._run(
            rows.pack(sequence),
            None if states is None else rows.sort(states),
            batch,
            rows.batch_sizes,
            None if resets is None else rows.pack_flags(resets),
            None if reset_states is None else rows.sort(reset_states),
        )
        return rows.unpack(output), rows.unsort(final)

    def _run(
        self,
        sequence: Tensor,
        states: tuple[Tensor, ...] | None,
        batch: int,
        batch_sizes: Tensor | None,
        resets: Tensor | None,
        reset_states: tuple[Tensor, ...] | None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Runs all layers over a sequence [T, B, I], or packed [N, I]; each state [L*D, B, P or H];
        resets [T, B], or packed [N].

        Dropout falls on the output of each layer but the last, in the layout in which torch.nn
        applies it: the same seed gives the same mask.
        """
        weights = [self._layer_weights(layer) for layer in range(self.num_layers)]
        self._check_sequence(sequence, batch_sizes, weights[0].weight_ih[0])
        sizes = self._state_sizes(batch)
        if states is None:
            states = self._initial_states(sequence, sizes)
        else:
            self._check_states(states, sizes)
        if reset_states is not None:
            self._check_states(reset_states, sizes, "reset_state")
        elif resets is not None and self.learn_initial_state:
            reset_states = self._initial_states(sequence, sizes)

        initial = [state.chunk(len(weights)) for state in states]
        after_reset = [state.chunk(len(weights)) for state in reset_states or ()]
        final: list[tuple[Tensor, ...]] = []
        for layer, layer_weights in enumerate(weights):
            if layer > 0:
                sequence = F.dropout(sequence, self.dropout, self.training)
            hx, *cx = (state[layer] for state in initial)
            reset_hx, reset_cx, *_ = (*(state[layer] for state in after_reset), None, None)
            sequence, h_n, c_n = ops.layer(
                sequence,
                hx,
                cx[0] if cx else None,
                layer_weights,
                cell=self.mode.lower(),
                batch_sizes=batch_sizes,
                resets=resets,
                reset_hx=reset_hx,
                reset_cx=reset_cx,
            )
            final.append((h_n,) if c_n is None else (h_n, c_n))
        if len(final) == 1:
            return sequence, final[0]
        return sequence, tuple(torch.cat(layers) for layers in zip(*final, strict=True))

    def _layer_weights(self, layer: int) -> LayerWeights:
        # A compiler traces the function itself, and warns of a cache.
        find = _weight_names if torch.compiler.is_compiling() else _cached_weight_names
        names = find(layer, self.bidirectional, self.bias, self.proj_size > 0)
        return LayerWeights(*[tuple([getattr(self, name) for name in field]) for field in names])

    def _initial_states(
        self, sequence: Tensor, sizes: tuple[tuple[int, int, int], ...]
    ) -> tuple[Tensor, ...]:
        """The states where none are given: the learned ones, else zeros."""
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
        count = self.num_layers * (2 if self.bidirectional else 1)
        return ((count, batch, self.proj_size or self.hidden_size),)

    def _check_sequence(self, sequence: Tensor, batch_sizes: Tensor | None, weight: Tensor) -> None:
        packed = batch_sizes is not None
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
        if sequence.dim() != rank:
            raise RuntimeError(f"input must have {rank} dimensions, got {sequence.dim()}")
        if sequence.size(-1) != self.input_size:
            raise RuntimeError(
                "input.size(-1) must be equal to input_size. "
                f"Expected {self.input_size}, got {sequence.size(-1)}"
            )
        if not packed and sequence.size(0) == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN, got 0")

    def _check_state_rank(
        self, states: tuple[Tensor, ...] | None, rank: int, what: str = "hx"
    ) -> None:
        if states is None or all(state.dim() == rank for state in states):
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
        sizes: tuple[tuple[int, int, int], ...],
        what: str = "hidden",
    ) -> None:
        for index, (state, size) in enumerate(zip(states, sizes, strict=True)):
            if state.size() != size:
                name = what if len(states) == 1 else f"{what}[{index}]"
                got = list(state.size())
                if self.batch_first_states:
                    size, got = (size[1], size[0], size[2]), [got[1], got[0], got[2]]
                raise RuntimeError(f"Expected {name} size {size}, got {got}")


def _weight_names(
    layer: int, bidirectional: bool, bias: bool, projected: bool
) -> tuple[tuple[str, ...], ...]:
    """The attributes that hold one layer's weights, in the form of LayerWeights."""
    present = (True, True, bias, bias, projected)
    directions = ("", "_reverse") if bidirectional else ("",)
    return tuple(
        tuple(f"{kind}_l{layer}{direction}" for direction in directions) if there else ()
        for kind, there in zip(LayerWeights._fields, present, strict=True)
    )


_cached_weight_names = cache(_weight_names)
