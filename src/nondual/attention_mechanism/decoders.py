"""Recurrent decoders that read an encoder's states before, or after, each step.

    AttentionDecoder   torch's GRU cell, asked with the previous state
    BahdanauDecoder    the decoder of 2014 as its appendix has it
    LuongDecoder       asked with the present state; what was read is fed into the next step

The last two are made from a module of `nondual.attention_mechanism.attention`, through which they read, and have the
same calls: `memory` once a sentence, `start`, `step`, and `forward` for all steps of a known target.

Sources: Bahdanau et al. 2014 (1409.0473), sections 3.1, A.1.1 and A.2.2; Luong et al. 2015 (1508.04025), sections 3 and
3.3. Symbols: y embedded outputs (B, N, Y) [E y_{i-1}], s states (B, S), h encoder states (B, M, H), c contexts (B, H).
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nondual.attention_mechanism.attention import AdditiveAttention, Attention
from nondual.ops.checks import check_tensors


class AttentionDecoder(nn.Module):
    """One GRU cell that, before each step, asks the encoder's states a question with its own previous state.

        c_i = attend(s_{i-1}, h),   s_i = GRU([y_{i-1}; c_i], s_{i-1})

    Args:
        d_input: width of the embedded previous output y.
        d_state: width S of the decoder's state.
        d_memory: width H of the encoder's states.
        d_attention: width A of the comparison.

    Source: 1409.0473, sections 3.1 and A.1.2, with torch's GRU cell.
    """

    attention: AdditiveAttention
    cell: nn.GRUCell

    def __init__(self, d_input: int, d_state: int, d_memory: int, d_attention: int):
        super().__init__()
        self.attention = AdditiveAttention(d_state, d_memory, d_attention)
        self.cell = nn.GRUCell(d_input + d_memory, d_state)

    def step(
        self,
        y: Float[Tensor, "b y"],
        s: Float[Tensor, "b s"],
        h: Float[Tensor, "b m h"],
        mask: Bool[Tensor, "..."] | None = None,
        *,
        projected: Float[Tensor, "b m a"] | None = None,
    ) -> tuple[Float[Tensor, "b s"], Float[Tensor, "b m"]]:
        """One step: the next state, and the weights it read with.

        Args:
            y: the previous output, embedded (B, Y).
            s: the previous state (B, S).
            h: encoder states (B, M, H).
            mask: as in `attend`.
            projected: `attention.project(h)`, (B, M, A). It is the same at every step: give it where h is read more
                than once. Computed here where left out.

        Returns:
            (the next state (B, S), the weights (B, M)).

        Raises:
            TypeError, ValueError: as `AdditiveAttention.forward` raises them.
        """
        check_tensors({"y": y, "s": s})
        context, weights = self.attention(s[:, None], h, mask, projected=projected)
        return self.cell(torch.cat([y, context[:, 0]], dim=-1), s), weights[:, 0]

    def forward(
        self,
        y: Float[Tensor, "b n y"],
        s: Float[Tensor, "b s"],
        h: Float[Tensor, "b m h"],
        mask: Bool[Tensor, "..."] | None = None,
    ) -> tuple[Float[Tensor, "b n s"], Float[Tensor, "b n m"]]:
        """All steps, each given the true previous output (teacher forcing). W_h h is computed once, before the first.

        Args:
            y: the previous outputs, embedded (B, N, Y).
            s: the first state (B, S).
            h: encoder states (B, M, H).
            mask: as in `attend`.

        Returns:
            (states (B, N, S), weights (B, N, M)).

        Raises:
            TypeError, ValueError: as `AdditiveAttention.forward` raises them; y of length 0.
        """
        check_tensors({"y": y, "s": s})
        if y.shape[1] == 0:
            raise ValueError("y must hold one step or more, got length 0")
        projected, states, weights = self.attention.project(h), [], []
        for i in range(y.shape[1]):
            s, row = self.step(y[:, i], s, h, mask, projected=projected)
            states.append(s)
            weights.append(row)
        return torch.stack(states, 1), torch.stack(weights, 1)

    if TYPE_CHECKING:  # what nn.Module hands on to forward

        def __call__(self, y: Tensor, s: Tensor, h: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]: ...


class Memory(NamedTuple):
    """What a decoder reads, made once a sentence: h (B, M, H), its projection (B, M, A), mask (B, 1, M) or None."""

    h: Tensor
    projected: Tensor
    mask: Tensor | None


class _ReadingDecoder(nn.Module):
    """What both decoders share: the memory, the first state, and the loop over a known target."""

    attention: Attention
    d_input: int
    d_state: int
    w_0: nn.Linear

    def __init__(self, d_input: int, attention: Attention):
        super().__init__()
        if d_input < 1:
            raise ValueError(f"d_input must be 1 or more, got {d_input}")
        if attention.d_memory % 2:
            raise ValueError(
                "the attention's d_memory must be even, a forward and a backward half as a bidirectional encoder gives "
                f"them, got {attention.d_memory}"
            )
        self.attention, self.d_input, self.d_state = attention, d_input, attention.d_state
        self.w_0 = nn.Linear(attention.d_memory // 2, self.d_state)

    def memory(self, h: Float[Tensor, "b m h"], mask: Bool[Tensor, "..."] | None = None) -> Memory:
        """What every step reads: h, what the attention projects it to, and the mask.

        Args:
            h: encoder states (B, M, H), the forward half first.
            mask: bool (B, 1, M), True on real positions.

        Raises:
            TypeError, ValueError: as `Attention.project` raises them; a source of length 0.
        """
        if isinstance(h, Tensor) and h.ndim == 3 and h.shape[1] == 0:
            raise ValueError("h must hold one position or more, got length 0")
        return Memory(h, self.attention.project(h), mask)

    def first(self, memory: Memory) -> Tensor:
        """s_0 = tanh(W_0 h_1), h_1 the backward half at the first position: it has read the whole source. (B, S)."""
        return torch.tanh(self.w_0(memory.h[:, 0, memory.h.shape[-1] // 2 :]))

    # --8<-- [start:read]
    def read(self, s: Tensor, memory: Memory, past: Tensor) -> tuple[Tensor, ...]:
        """One look: the context (B, H), the weights (B, M), what is remembered (B, M)."""
        h, projected, mask = memory
        c, weights = self.attention(s[:, None], h, mask, projected=projected, past=past)
        c, weights = c[:, 0], weights[:, 0]
        return c, weights, self.attention.carry(past, weights)

    # --8<-- [end:read]

    def _check(self, y: Tensor, ndim: int) -> None:
        check_tensors({"y": y})
        if y.ndim != ndim or y.shape[-1] != self.d_input:
            letters = "(B, N, " if ndim == 3 else "(B, "
            raise ValueError(f"y must be {letters}{self.d_input}), got {tuple(y.shape)}")
        if ndim == 3 and y.shape[1] == 0:
            raise ValueError("y must hold one step or more, got length 0")


class BahdanauDecoder(_ReadingDecoder):
    """The decoder of 2014: it looks with its previous state, and says the next word from that state and what it saw.

        c_i = attend(s_{i-1}, h)
        z_i = σ(W_z y_{i-1} + U_z s_{i-1} + C_z c_i),   r_i = σ(W_r y_{i-1} + U_r s_{i-1} + C_r c_i)
        ŝ_i = tanh(W y_{i-1} + U [r_i ∘ s_{i-1}] + C c_i),   s_i = (1 - z_i) ∘ s_{i-1} + z_i ∘ ŝ_i
        u_i = U_o s_{i-1} + V_o y_{i-1} + C_o c_i,   t_i = max of each pair of neighbours in u_i

    The reset gate acts on the state before U, and z_i is the share of what is new; torch's GRU has the gate after U,
    and the share the other way round. As in the paper the output t_i comes from s_{i-1}, not from s_i. The W have
    biases, which the paper leaves out "to make the equations uncluttered".

    Args:
        d_input: width Y of the embedded previous output.
        attention: what reads the encoder's states; it sets the widths S and H.
        d_output: width l of the output t.

    Raises:
        ValueError: a width below 1; an attention over states of one direction (an odd H).

    Source: 1409.0473, appendix A.2.2; maxout: Goodfellow et al. 2013 (1302.4389).
    """

    w: nn.Linear
    u_gates: nn.Linear
    u: nn.Linear
    c: nn.Linear
    u_o: nn.Linear
    v_o: nn.Linear
    c_o: nn.Linear

    def __init__(self, d_input: int, attention: Attention, d_output: int):
        super().__init__(d_input, attention)
        if d_output < 1:
            raise ValueError(f"d_output must be 1 or more, got {d_output}")
        d_state, d_memory = attention.d_state, attention.d_memory
        self.w = nn.Linear(d_input, 3 * d_state)  # W_z, W_r, W, in this order, as U and C below
        self.u_gates = nn.Linear(d_state, 2 * d_state, bias=False)
        self.u = nn.Linear(d_state, d_state, bias=False)
        self.c = nn.Linear(d_memory, 3 * d_state, bias=False)
        self.u_o = nn.Linear(d_state, 2 * d_output, bias=False)
        self.v_o = nn.Linear(d_input, 2 * d_output)
        self.c_o = nn.Linear(d_memory, 2 * d_output, bias=False)
        for square in (*self.u_gates.weight.detach().chunk(2), self.u.weight.detach()):
            nn.init.orthogonal_(square)

    def start(self, memory: Memory) -> tuple[Tensor, Tensor]:
        """The state before the first step: (s_0 (B, S), what the attention remembers (B, M))."""
        return self.first(memory), self.attention.start(memory.h, memory.mask)

    # --8<-- [start:unit]
    def unit(self, y: Tensor, s: Tensor, c: Tensor) -> Tensor:
        """s_i (B, S) from W y_{i-1} (B, 3S), s_{i-1} (B, S) and c_i (B, H)."""
        z_in, r_in, new_in = (y + self.c(c)).chunk(3, -1)
        z_state, r_state = self.u_gates(s).chunk(2, -1)
        z, r = torch.sigmoid(z_in + z_state), torch.sigmoid(r_in + r_state)
        new = torch.tanh(new_in + self.u(r * s))
        return (1 - z) * s + z * new

    # --8<-- [end:unit]

    # --8<-- [start:output]
    def output(
        self, y: Float[Tensor, "... y"], s: Float[Tensor, "... s"], c: Float[Tensor, "... h"]
    ) -> Float[Tensor, "... l"]:
        """t_i from y_{i-1}, s_{i-1} and c_i: of each two neighbours the larger (maxout)."""
        u = self.u_o(s) + self.v_o(y) + self.c_o(c)
        return u.unflatten(-1, (-1, 2)).amax(-1)

    # --8<-- [end:output]

    def step(
        self, y: Float[Tensor, "b y"], state: tuple[Tensor, Tensor], memory: Memory
    ) -> tuple[Float[Tensor, "b l"], tuple[Tensor, Tensor], Float[Tensor, "b m"]]:
        """One step.

        Args:
            y: the previous output, embedded (B, Y).
            state: from `start` or the step before.
            memory: from `memory`.

        Returns:
            (t_i (B, l), the next state, the weights it read with (B, M)).

        Raises:
            TypeError, ValueError: y of another rank or width.
        """
        self._check(y, 2)
        s, past = state
        c, weights, past = self.read(s, memory, past)
        return self.output(y, s, c), (self.unit(self.w(y), s, c), past), weights

    def forward(
        self, y: Float[Tensor, "b n y"], h: Float[Tensor, "b m h"], mask: Bool[Tensor, "..."] | None = None
    ) -> tuple[Float[Tensor, "b n l"], Float[Tensor, "b n m"]]:
        """All steps, each given the true previous output (teacher forcing). What needs no loop is outside of it.

        Args:
            y: the previous outputs, embedded (B, N, Y).
            h: encoder states (B, M, H), the forward half first.
            mask: bool (B, 1, M), True on real positions.

        Returns:
            (t (B, N, l), weights (B, N, M)).

        Raises:
            TypeError, ValueError: as `memory` raises them; y of another rank or width, or of length 0.
        """
        self._check(y, 3)
        memory = self.memory(h, mask)
        s, past = self.start(memory)
        states, contexts, rows = [], [], []
        for w_y in self.w(y).unbind(1):
            c, weights, past = self.read(s, memory, past)
            states.append(s)
            contexts.append(c)
            rows.append(weights)
            s = self.unit(w_y, s, c)
        t = self.output(y, torch.stack(states, 1), torch.stack(contexts, 1))
        return t, torch.stack(rows, 1)

    if TYPE_CHECKING:  # what nn.Module hands on to forward

        def __call__(self, y: Tensor, h: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]: ...


class LuongDecoder(_ReadingDecoder):
    """The decoder of 2015: it steps, looks with the state it has reached, and feeds what it made of both into the next.

        s_t = GRU([y_{t-1}; h̃_{t-1}], s_{t-1}),   c_t = attend(s_t, h),   h̃_t = tanh(W_c [c_t; s_t])

    The paper's cell is an LSTM of several layers that starts from the encoder's last state; here it is torch's GRU
    cell, and s_0 = tanh(W_0 h_1) as in `BahdanauDecoder`.

    Args:
        d_input: width Y of the embedded previous output.
        attention: what reads the encoder's states; it sets the widths S and H.
        d_output: width of h̃.

    Raises:
        ValueError: a width below 1; an attention over states of one direction (an odd H).

    Source: 1508.04025, equation 5 and section 3.3 ("input-feeding").
    """

    cell: nn.GRUCell
    w_c: nn.Linear

    def __init__(self, d_input: int, attention: Attention, d_output: int):
        super().__init__(d_input, attention)
        if d_output < 1:
            raise ValueError(f"d_output must be 1 or more, got {d_output}")
        self.cell = nn.GRUCell(d_input + d_output, self.d_state)
        self.w_c = nn.Linear(attention.d_memory + self.d_state, d_output, bias=False)

    def start(self, memory: Memory) -> tuple[Tensor, Tensor, Tensor]:
        """The state before the first step: (s_0 (B, S), what the attention remembers (B, M), h̃_0 = 0)."""
        s = self.first(memory)
        return s, self.attention.start(memory.h, memory.mask), s.new_zeros(s.shape[0], self.w_c.out_features)

    def step(
        self, y: Float[Tensor, "b y"], state: tuple[Tensor, Tensor, Tensor], memory: Memory
    ) -> tuple[Float[Tensor, "b l"], tuple[Tensor, Tensor, Tensor], Float[Tensor, "b m"]]:
        """One step, as `BahdanauDecoder.step`: (h̃_t (B, l), the next state, the weights (B, M))."""
        self._check(y, 2)
        s, past, fed = state
        s = self.cell(torch.cat([y, fed], -1), s)
        c, weights, past = self.read(s, memory, past)
        fed = torch.tanh(self.w_c(torch.cat([c, s], -1)))
        return fed, (s, past, fed), weights

    def forward(
        self, y: Float[Tensor, "b n y"], h: Float[Tensor, "b m h"], mask: Bool[Tensor, "..."] | None = None
    ) -> tuple[Float[Tensor, "b n l"], Float[Tensor, "b n m"]]:
        """All steps, each given the true previous output, as `BahdanauDecoder.forward`."""
        self._check(y, 3)
        memory = self.memory(h, mask)
        state, outputs, rows = self.start(memory), [], []
        for y_i in y.unbind(1):
            out, state, weights = self.step(y_i, state, memory)
            outputs.append(out)
            rows.append(weights)
        return torch.stack(outputs, 1), torch.stack(rows, 1)

    if TYPE_CHECKING:  # what nn.Module hands on to forward

        def __call__(self, y: Tensor, h: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]: ...
