"""Recurrent networks: one state, carried from each position to the next. RNN, LSTM and GRU, and a mixer made of one.

Source: Elman 1990, "Finding structure in time"; Hochreiter and Schmidhuber 1997, "Long short-term memory", with the
forget gate of Gers, Schmidhuber and Cummins 2000; Cho et al. 2014 (1406.1078), section 2.3, for the GRU. Symbols: x (B,
N, I), B sequences of N positions; h the state (B, H); c the cell of an LSTM (B, H); W and U the matrices of the input
and of the state; σ the logistic function; ⊙ the product number by number.

    RNN    h_t = tanh(W x_t + U h_{t-1} + b)
    LSTM   c_t = f_t ⊙ c_{t-1} + i_t ⊙ g_t,   h_t = o_t ⊙ tanh(c_t)
    GRU    h_t = z_t ⊙ h_{t-1} + (1 - z_t) ⊙ n_t

W x_t does not depend on the state: it is computed for all positions in one product. What depends on h_{t-1} must wait
for it, so that the rest is a loop over N. Parameters are named and laid out as in torch.nn.RNN, LSTM and GRU, and start
as they do: state_dicts load both ways.

Where we differ from torch: x is (B, N, I), never (N, B, I) or (N, I); there is no proj_size; states are kept and
returned in float32 or better, so that reading a sequence in parts gives what reading it at once does.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, overload

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from nondual.mixers import check_reset
from nondual.ops.autocast import is_autocasting
from nondual.ops.checks import check_sizes, check_tensors
from nondual.ops.dtypes import accumulation_dtype, at_least_float32

State = TypeVar("State", Tensor, tuple[Tensor, Tensor])
"""What a network hands on: h (layers · directions, B, H); an LSTM the pair (h, c), each of that shape."""

# --- one step ------------------------------------------------------------------------------------------------------


def rnn_step(
    given: Float[Tensor, "b h"],
    h: Float[Tensor, "b h"],
    u: Float[Tensor, "h h"],
    bias: Float[Tensor, " h"] | None = None,
    *,
    nonlinearity: Callable[[Tensor], Tensor] = torch.tanh,
) -> Float[Tensor, "b h"]:
    """h_t = tanh(W x_t + U h_{t-1} + b): the new state from the input and the old state.

    Args:
        given: W x_t and its bias (B, H).
        h: the state before, h_{t-1} (B, H).
        u: U (H, H).
        bias: added to U h (H,).
        nonlinearity: torch.tanh or torch.relu.

    Source: Elman 1990, figure 2, with torch's two biases.
    """
    # --8<-- [start:rnn]
    return nonlinearity(given + from_state(h, u, bias))
    # --8<-- [end:rnn]


def lstm_step(
    given: Float[Tensor, "b four_h"],
    h: Float[Tensor, "b h"],
    c: Float[Tensor, "b h"],
    u: Float[Tensor, "four_h h"],
    bias: Float[Tensor, " four_h"] | None = None,
) -> tuple[Float[Tensor, "b h"], Float[Tensor, "b h"]]:
    """c_t = f ⊙ c_{t-1} + i ⊙ g, h_t = o ⊙ tanh(c_t): gates say what is kept, taken in and shown.

    Args:
        given: W x_t and its bias (B, 4H), in torch's order i, f, g, o.
        h: the state before, h_{t-1} (B, H).
        c: the cell before, c_{t-1} (B, H).
        u: U (4H, H), in the same order.
        bias: added to U h (4H,).

    Returns:
        (h_t, c_t), each (B, H).

    Source: Hochreiter and Schmidhuber 1997, section 4 (i and o are its input and output gate); the forget gate f is
    that of Gers, Schmidhuber and Cummins 2000, section 3.
    """
    # --8<-- [start:lstm]
    i, f, g, o = (given + from_state(h, u, bias)).chunk(4, dim=-1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c
    # --8<-- [end:lstm]


def gru_step(
    given: Float[Tensor, "b three_h"],
    h: Float[Tensor, "b h"],
    u: Float[Tensor, "three_h h"],
    bias: Float[Tensor, " three_h"] | None = None,
    *,
    reset_after: bool = True,
) -> Float[Tensor, "b h"]:
    """h_t = z ⊙ h_{t-1} + (1 - z) ⊙ n: z says how much stays, r how much of the past the new value n may use.

    The reset gate r stands in one of two places:

        reset_after    n = tanh(W x_t + r ⊙ (U h_{t-1} + b))     torch's and cuDNN's: one product with U a step
        otherwise      n = tanh(W x_t + U (r ⊙ h_{t-1}) + b)     the paper's

    Args:
        given: W x_t and its bias (B, 3H), in torch's order r, z, n.
        h: the state before, h_{t-1} (B, H).
        u: U (3H, H), in the same order.
        bias: added to U h (3H,).
        reset_after: as above.

    Source: 1406.1078, equations 5 to 8. There, as here, z is the share of the old state; in 1409.0473, of the new one.
    """
    # --8<-- [start:gru]
    width = h.shape[-1]
    x_rz, x_n = given.split([2 * width, width], dim=-1)
    if reset_after:
        h_rz, h_n = from_state(h, u, bias).split([2 * width, width], dim=-1)
        r, z = torch.sigmoid(x_rz + h_rz).chunk(2, dim=-1)
        n = torch.tanh(x_n + r * h_n)
    else:
        b_rz, b_n = (None, None) if bias is None else bias.split([2 * width, width])
        h_rz = from_state(h, u[: 2 * width], b_rz)
        r, z = torch.sigmoid(x_rz + h_rz).chunk(2, dim=-1)
        n = torch.tanh(x_n + from_state(r * h, u[2 * width :], b_n))
    return z * h + (1 - z) * n
    # --8<-- [end:gru]


def from_state(h: Tensor, u: Tensor, bias: Tensor | None) -> Tensor:
    """U h + b in float32 or better; the product itself is in the dtype of U, or in that of autocast."""
    return at_least_float32(F.linear(h.to(u.dtype), u, bias))


# --- the loop ------------------------------------------------------------------------------------------------------

Step = Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]


def unroll(
    step: Step,
    given: Float[Tensor, "b n g"],
    state: tuple[Tensor, ...],
    *,
    alive: Bool[Tensor, "b n"] | None = None,
    reset: Bool[Tensor, "b n"] | None = None,
    reverse: bool = False,
) -> tuple[Float[Tensor, "b n h"], tuple[Tensor, ...]]:
    """One layer in one direction: a step for each position, in order; each needs the state of the one before.

    Args:
        step: (given_t (B, G), state) -> state, a tuple of tensors (B, H), the first of which is the output.
        given: what the input alone gives, W x_t and its bias, for all positions (B, N, G).
        state: before the first step.
        alive: True at real positions. At others the state stays as it is and the output is 0.
        reset: True where the state becomes zero before the step.
        reverse: go from the last position to the first.

    Returns:
        (y (B, N, H), the state after the last step).
    """
    # --8<-- [start:loop]
    outputs: list[Tensor] = []
    steps = list(enumerate(given.unbind(1)))
    for t, given_t in reversed(steps) if reverse else steps:
        if reset is not None:
            state = tuple(s.masked_fill(reset[:, t, None], 0) for s in state)
        new = step(given_t, state)
        if alive is not None:
            real = alive[:, t, None]
            new = tuple(torch.where(real, a, b) for a, b in zip(new, state))
        state = new
        outputs.append(state[0])
    # --8<-- [end:loop]
    if not outputs:
        return state[0].new_zeros(len(given), 0, state[0].shape[-1]), state
    y = torch.stack(outputs[::-1] if reverse else outputs, dim=1)
    return y if alive is None else y.masked_fill(~alive[..., None], 0), state


# --- the networks --------------------------------------------------------------------------------------------------


class RecurrentNetwork(nn.Module, Generic[State]):
    """What RNN, LSTM and GRU share: layers, directions, lengths, and torch's parameters. Not meant to be made itself.

    Parameters of layer k, with G gates: weight_ih_lk (G·H, I or H·directions), weight_hh_lk (G·H, H), bias_ih_lk and
    bias_hh_lk (G·H,); those of the backward direction end in _reverse. All start uniform between ±1/√H, drawn in
    torch's order.
    """

    gates: int = 1
    n_states: int = 1
    d_input: int
    d_hidden: int
    n_layers: int
    bidirectional: bool
    dropout: float
    bias: bool

    def __init__(
        self,
        d_input: int,
        d_hidden: int,
        n_layers: int = 1,
        *,
        bidirectional: bool = False,
        dropout: float = 0.0,
        bias: bool = True,
    ):
        super().__init__()
        check_sizes(d_input=d_input, d_hidden=d_hidden, n_layers=n_layers)
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout must be a probability between 0 and 1, got {dropout}")
        if dropout and n_layers == 1:
            raise ValueError(f"dropout acts between layers: with one layer it must be 0, got {dropout}")
        self.d_input, self.d_hidden, self.n_layers = d_input, d_hidden, n_layers
        self.bidirectional, self.dropout, self.bias = bidirectional, dropout, bias
        for layer in range(n_layers):
            width = d_input if layer == 0 else d_hidden * self.directions
            for end in self._ends(layer):
                rows = self.gates * d_hidden
                self._new(f"weight_ih_{end}", rows, width)
                self._new(f"weight_hh_{end}", rows, d_hidden)
                if bias:
                    self._new(f"bias_ih_{end}", rows)
                    self._new(f"bias_hh_{end}", rows)

    def _new(self, name: str, *shape: int) -> None:
        edge = 1 / math.sqrt(self.d_hidden)
        self.register_parameter(name, nn.Parameter(torch.empty(shape).uniform_(-edge, edge)))

    def _parameters_of(self, end: str) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """W, U and the two biases of one layer in one direction."""
        names = ["weight_ih", "weight_hh"] + (["bias_ih", "bias_hh"] if self.bias else [])
        w, u, *biases = (getattr(self, f"{name}_{end}") for name in names)
        b_x, b_h = biases or (None, None)
        return w, u, b_x, b_h

    def _ends(self, layer: int) -> list[str]:
        """How the names of a layer's parameters end, forward and backward."""
        return [f"l{layer}", f"l{layer}_reverse"][: self.directions]

    @property
    def directions(self) -> int:
        """2 where the sequence is also read from its end, else 1."""
        return 2 if self.bidirectional else 1

    def step(self, given: Tensor, state: tuple[Tensor, ...], u: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        """One step of one layer, from what the input gives and the state before."""
        raise NotImplementedError("RecurrentNetwork is the common part of RNN, LSTM and GRU: make one of those")

    @overload
    def forward(
        self, x: Tensor, state: State | None = None, *, lengths: Tensor | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, State]: ...
    @overload
    def forward(self, x: PackedSequence, state: State | None = None) -> tuple[PackedSequence, State]: ...
    def forward(
        self,
        x: Float[Tensor, "b n i"] | PackedSequence,
        state: Any = None,
        *,
        lengths: Integer[Tensor, " b"] | None = None,
        reset: Bool[Tensor, "b n"] | None = None,
    ) -> Any:
        """x (B, N, I) -> y (B, N, H · directions), and the state after the last position.

        Args:
            x: (B, N, I) in the dtype of the weights (any floating dtype under autocast), or a PackedSequence, which is
                answered with one. N may be 0.
            state: before the first position, h (layers · directions, B, H), for an LSTM the pair (h, c); zeros where
                left out. The layers come first, and of each layer forward before backward.
            lengths: how many positions of each row are real, 1 to N, integers (B,). Beyond them y is 0, whatever x is
                there; the state of a row is that of its last real position, and the backward direction begins there.
            reset: True at the first position of each of several sequences packed along N: the state becomes zero
                before it. Not where the sequence is also read from its end.

        Returns:
            (y, state): y (B, N, H · directions) in the dtype of x, or of autocast; state in the shape of the argument,
            in float32 or better.

        Raises:
            TypeError: x, lengths, reset or state that is not a Tensor; for an LSTM, a state that is not a pair of them.
            ValueError: x of another rank, width or dtype, lengths that are not integers between 1 and N, a state of
                another shape, dtype or device, lengths or reset together with a PackedSequence, a reset that does not
                fit.
        """
        if isinstance(x, PackedSequence):
            if lengths is not None or reset is not None:
                raise ValueError("lengths and reset must be left out where x is a PackedSequence, which has its own")
            return self._packed(x, state)
        states = self._checked(x, state, lengths, reset)
        alive = None
        if lengths is not None:
            alive = torch.arange(x.shape[1], device=x.device) < lengths.to(x.device)[:, None]
            x = x.masked_fill(~alive[..., None], 0)  # what stands in the padding, NaN too, reaches no gradient
        y, states = self._read(x, states, alive, reset)
        return y, states if self.n_states == 2 else states[0]

    if TYPE_CHECKING:  # what nn.Module hands on to forward

        @overload
        def __call__(
            self, x: Tensor, state: State | None = None, *, lengths: Tensor | None = None, reset: Tensor | None = None
        ) -> tuple[Tensor, State]: ...
        @overload
        def __call__(self, x: PackedSequence, state: State | None = None) -> tuple[PackedSequence, State]: ...
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def _read(
        self, x: Tensor, states: tuple[Tensor, ...], alive: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """All layers and directions: each layer reads what the one before it put out."""
        last: list[tuple[Tensor, ...]] = []
        for layer in range(self.n_layers):
            ways = []
            for end in self._ends(layer):
                w, u, b_x, b_h = self._parameters_of(end)
                given = F.linear(x, w, b_x)  # for all positions at once
                state = tuple(s[len(last)] for s in states)
                y, state = unroll(
                    lambda given_t, state, u=u, b=b_h: self.step(given_t, state, u, b),
                    at_least_float32(given),
                    state,
                    alive=alive,
                    reset=reset,
                    reverse=end.endswith("_reverse"),
                )
                ways.append(y.to(given.dtype))
                last.append(state)
            x = torch.cat(ways, dim=-1)
            if layer < self.n_layers - 1:
                x = F.dropout(x, self.dropout, self.training)
        return x, tuple(torch.stack(of_all) for of_all in zip(*last))

    def _packed(self, x: PackedSequence, state: Any) -> tuple[PackedSequence, Any]:
        """As torch answers it: a PackedSequence in the same order, and the state in the order of the batch."""
        whole, lengths = pad_packed_sequence(PackedSequence(x.data, x.batch_sizes), batch_first=True)

        def ordered(states: Any, order: Tensor | None) -> Any:
            if states is None or order is None:
                return states
            one = isinstance(states, Tensor)
            return states.index_select(1, order) if one else tuple(ordered(s, order) for s in states)

        self._checked(whole, state, None, None)
        y, state = self.forward(whole, ordered(state, x.sorted_indices), lengths=lengths)
        packed = pack_padded_sequence(y, lengths, batch_first=True)
        answer = PackedSequence(packed.data, x.batch_sizes, x.sorted_indices, x.unsorted_indices)
        return answer, ordered(state, x.unsorted_indices)

    def _checked(self, x: Tensor, state: Any, lengths: Tensor | None, reset: Tensor | None) -> tuple[Tensor, ...]:
        """Refuse what does not fit; the states as a tuple, in float32 or better."""
        check_tensors({"x": x}, {"lengths": lengths, "reset": reset})
        if x.ndim != 3 or x.shape[-1] != self.d_input:
            raise ValueError(f"x must be (B, N, {self.d_input}), got {tuple(x.shape)}")
        weight = self.weight_ih_l0
        assert isinstance(weight, Tensor)
        if not x.is_floating_point() or (x.dtype != weight.dtype and not is_autocasting(x.device.type)):
            raise ValueError(
                f"x must have the dtype of the weights, {weight.dtype}, got {x.dtype}; convert one of them"
            )
        if lengths is not None:
            self._check_lengths(x, lengths)
        if reset is not None:
            check_reset(reset, x)
            if self.bidirectional:
                raise ValueError("reset must be left out where the sequence is also read from its end")
        wide = accumulation_dtype(x.dtype, weight.dtype)
        shape = (self.n_layers * self.directions, x.shape[0], self.d_hidden)
        if state is None:
            return tuple(x.new_zeros(shape, dtype=wide) for _ in range(self.n_states))
        if self.n_states == 2 and not (isinstance(state, Sequence) and len(state) == 2):
            raise TypeError(f"state must be a pair of Tensors (h, c), got {type(state).__name__}")
        named: dict[str, Any] = dict(zip(("h", "c"), state)) if self.n_states == 2 else {"state": state}
        check_tensors(named)
        for name, s in named.items():
            if tuple(s.shape) != shape:
                raise ValueError(f"{name} must be (layers · directions, B, H) = {shape}, got {tuple(s.shape)}")
            if not s.is_floating_point():
                raise ValueError(f"{name} must be floating point, got {s.dtype}")
            if s.device != x.device:
                raise ValueError(f"{name} must be on the device of x, {x.device}, got {s.device}")
        return tuple(s.to(wide) for s in named.values())

    @staticmethod
    def _check_lengths(x: Tensor, lengths: Tensor) -> None:
        if tuple(lengths.shape) != (x.shape[0],) or lengths.dtype == torch.bool or lengths.is_floating_point():
            raise ValueError(
                f"lengths must be integers (B,) = ({x.shape[0]},), got {lengths.dtype} {tuple(lengths.shape)}"
            )
        if torch.compiler.is_compiling() or not lengths.numel() or lengths.is_meta:
            return
        low, high = (int(edge) for edge in lengths.aminmax())
        if low < 1 or high > x.shape[1]:
            wrong = low if low < 1 else high
            raise ValueError(f"lengths must be between 1 and N = {x.shape[1]}, got {wrong}; leave empty rows out")

    def extra_repr(self) -> str:
        """What it was made with."""
        said = [str(self.d_input), str(self.d_hidden)] + ([str(self.n_layers)] if self.n_layers > 1 else [])
        said += ["bidirectional=True"] if self.bidirectional else []
        said += [f"dropout={self.dropout}"] if self.dropout else []
        return ", ".join(said + ([] if self.bias else ["bias=False"]))


class RNN(RecurrentNetwork[Tensor]):
    """A simple recurrent network: h_t = tanh(W x_t + U h_{t-1} + b). Takes and gives what torch.nn.RNN does, see above.

        y, h = RNN(32, 64)(x)                        # x (B, N, 32), y (B, N, 64), h (1, B, 64)
        y, h = RNN(32, 64)(x, lengths=lengths)       # rows of unlike lengths, padded at the end

    Args:
        d_input: width I of x.
        d_hidden: width H of the state.
        n_layers: how many, each reading the output of the one before.
        bidirectional: also read from the end, by parameters of its own; y holds both, forward first.
        dropout: the share of numbers set to 0 between layers, in training.
        bias: whether there are biases.
        nonlinearity: "tanh" or "relu".

    Raises:
        ValueError: a size below 1, a dropout outside 0 to 1 or where there is one layer, an unknown nonlinearity.
    """

    nonlinearity: Literal["tanh", "relu"]

    def __init__(
        self,
        d_input: int,
        d_hidden: int,
        n_layers: int = 1,
        *,
        bidirectional: bool = False,
        dropout: float = 0.0,
        bias: bool = True,
        nonlinearity: Literal["tanh", "relu"] = "tanh",
    ):
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}")
        super().__init__(d_input, d_hidden, n_layers, bidirectional=bidirectional, dropout=dropout, bias=bias)
        self.nonlinearity = nonlinearity

    def step(self, given: Tensor, state: tuple[Tensor, ...], u: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        """As `rnn_step`."""
        nonlinearity = torch.tanh if self.nonlinearity == "tanh" else torch.relu
        return (rnn_step(given, state[0], u, bias, nonlinearity=nonlinearity),)


class LSTM(RecurrentNetwork[tuple[Tensor, Tensor]]):
    """Long short-term memory: a cell whose gates say what is kept. Takes and gives what torch.nn.LSTM does.

        y, (h, c) = LSTM(32, 64)(x)

    Args:
        d_input: width I of x.
        d_hidden: width H of the state and of the cell.
        n_layers: how many, each reading the output of the one before.
        bidirectional: also read from the end, by parameters of its own; y holds both, forward first.
        dropout: the share of numbers set to 0 between layers, in training.
        bias: whether there are biases.
        forget_bias: what the forget gates' bias starts at, the sum of its two parts; as torch starts it where left
            out, near 0. With 1, as Jozefowicz, Zaremba and Sutskever 2015 advise (section 2.2), cells start by keeping
            most of what they hold.

    Raises:
        ValueError: as for `RNN`; a forget_bias where there are no biases.
    """

    gates = 4
    n_states = 2

    def __init__(
        self,
        d_input: int,
        d_hidden: int,
        n_layers: int = 1,
        *,
        bidirectional: bool = False,
        dropout: float = 0.0,
        bias: bool = True,
        forget_bias: float | None = None,
    ):
        super().__init__(d_input, d_hidden, n_layers, bidirectional=bidirectional, dropout=dropout, bias=bias)
        if forget_bias is None:
            return
        if not bias:
            raise ValueError(f"forget_bias must be left out where bias=False, got {forget_bias}")
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.startswith("bias"):
                    parameter[d_hidden : 2 * d_hidden] = forget_bias if name.startswith("bias_ih") else 0

    def step(self, given: Tensor, state: tuple[Tensor, ...], u: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        """As `lstm_step`."""
        h, c = state
        return lstm_step(given, h, c, u, bias)


class GRU(RecurrentNetwork[Tensor]):
    """A gated recurrent unit: each number of the state is kept or replaced. Takes and gives what torch.nn.GRU does.

        y, h = GRU(32, 64)(x)

    Args:
        d_input: width I of x.
        d_hidden: width H of the state.
        n_layers: how many, each reading the output of the one before.
        bidirectional: also read from the end, by parameters of its own; y holds both, forward first.
        dropout: the share of numbers set to 0 between layers, in training.
        bias: whether there are biases.
        reset_after: whether the reset gate acts after the product with U, as in torch and cuDNN, or before it, as in
            the paper; see `gru_step`.

    Raises:
        ValueError: as for `RNN`.
    """

    gates = 3
    reset_after: bool

    def __init__(
        self,
        d_input: int,
        d_hidden: int,
        n_layers: int = 1,
        *,
        bidirectional: bool = False,
        dropout: float = 0.0,
        bias: bool = True,
        reset_after: bool = True,
    ):
        super().__init__(d_input, d_hidden, n_layers, bidirectional=bidirectional, dropout=dropout, bias=bias)
        self.reset_after = reset_after

    def step(self, given: Tensor, state: tuple[Tensor, ...], u: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        """As `gru_step`."""
        return (gru_step(given, state[0], u, bias, reset_after=self.reset_after),)


# --- a mixer of positions ------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """A recurrent network as a mixer x (B, N, E) -> (B, N, E): the network, and one projection of its output.

        CausalLM(256, 64, 2, layer=lambda i: MixerBlock(Recurrent(64, GRU(64, 96)), 64))

    Args:
        d_model: width E of x and of the output.
        network: an RNN, LSTM or GRU that reads x of this width.
        bias: whether the projection has one.

    Raises:
        TypeError: a network of another class.
        ValueError: a network that reads another width.
    """

    d_model: int
    network: RecurrentNetwork[Any]
    out_proj: nn.Linear

    def __init__(self, d_model: int, network: RecurrentNetwork[Any], *, bias: bool = True):
        super().__init__()
        if not isinstance(network, RecurrentNetwork):
            raise TypeError(f"network must be an RNN, LSTM or GRU of this module, got {type(network).__name__}")
        if network.d_input != d_model:
            raise ValueError(f"network must read x of width d_model = {d_model}, got one of {network.d_input}")
        self.d_model, self.network = d_model, network
        self.out_proj = nn.Linear(network.d_hidden * network.directions, d_model, bias=bias)

    def forward(
        self,
        x: Float[Tensor, "b n e"],
        *,
        cache: "RecurrentCache | None" = None,
        reset: Bool[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b n e"]:
        """x (B, N, E) -> (B, N, E).

        Args:
            x: (B, N, E); N may be 0.
            cache: the state after the positions before x; it is brought up to date, unless this call raises. Reading a
                sequence in parts gives what reading it at once does, gradients too, unless torch.no_grad() says
                otherwise.
            reset: True at the first position of each of several sequences packed along N: each is as if alone. A batch
                padded on the left has it at its first real token.

        Raises:
            TypeError: as `RecurrentNetwork.forward`; a cache that is not a RecurrentCache.
            ValueError: as `RecurrentNetwork.forward`; a cache where the network also reads from the end.
        """
        if cache is not None:
            if not isinstance(cache, RecurrentCache):
                kind = type(cache).__name__
                raise TypeError(f"cache must be a RecurrentCache, from this module's new_cache, got {kind}")
            self._only_forward("cache")
        y, state = self.network(x, None if cache is None else cache.state, reset=reset)
        out = self.out_proj(y)
        if cache is not None:  # last of all: nothing that raises has changed it
            cache.state = state
        return out

    if TYPE_CHECKING:  # what nn.Module hands on to forward

        def __call__(
            self, x: Tensor, *, cache: "RecurrentCache | None" = None, reset: Tensor | None = None
        ) -> Tensor: ...

    def new_cache(self, batch: int, max_len: int | None = None) -> "RecurrentCache":
        """A cache of zeros for a batch of B sequences, of any length: max_len is not needed.

        Raises:
            ValueError: the network also reads from the end, and cannot go on from where it stopped.
        """
        self._only_forward("a cache")
        network = self.network
        like = self.out_proj.weight
        shape = (network.n_layers, batch, network.d_hidden)
        zeros = [at_least_float32(like.new_zeros(shape)) for _ in range(network.n_states)]
        return RecurrentCache((zeros[0], zeros[1]) if len(zeros) == 2 else zeros[0])

    def _only_forward(self, what: str) -> None:
        if self.network.bidirectional:
            raise ValueError(f"{what} must be left out: the network also reads from the end, which is not there yet")


@dataclass(eq=False)
class RecurrentCache:
    """The state after what a recurrent mixer has read: as much after one position as after a million.

    Attributes:
        state: h (layers, B, H), or an LSTM's pair (h, c); replaced by every call, never written into.
    """

    state: Tensor | tuple[Tensor, Tensor]

    def reset(self) -> None:
        """Zero state."""
        self._map(torch.zeros_like)

    def select(self, rows: Integer[Tensor, " r"]) -> "RecurrentCache":
        """A cache with these rows of the batch, in this order, each as often as it is named: what a beam search needs.

        Args:
            rows: indices into the batch, integers (R,).
        """
        chosen = RecurrentCache(self.state)
        chosen._map(lambda s: s.index_select(1, rows))
        return chosen

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        state = self.state
        self.state = function(state) if isinstance(state, Tensor) else (function(state[0]), function(state[1]))
