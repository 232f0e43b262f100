"""The Continuous Thought Machine: a recurrent network that takes ticks of its own to think about one input.

Source: Darlow et al. 2025 (2505.05522), section 3, equations 1 to 11, and listings 1 to 4. At each tick the
synchronisation of pairs of neurons asks for features of the input by attention (equations 7 and 8); synapses make the
next pre-activations (1); each neuron's own model reads the last M of these and gives its post-activation (2, 3); and a
second synchronisation is read as the prediction (6, 10). The number of ticks does not depend on the input.

Symbols: B batch, N features of the input, T ticks, D neurons, M pre-activations in a history, H heads, C classes.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from nondual.ops.attention import attention as softmax_attention
from nondual.ops.checks import check_tensors
from nondual.ops.dtypes import at_least_float32
from nondual.recent.ctm_parts import NeuronModels, Sums, Synapses, Synchronisation, check_counts, random_pairs
from nondual.self_attention import MultiHeadAttention, ProjectedMemory


class Thoughts(NamedTuple):
    """What a machine gave at each of T ticks.

    Attributes:
        predictions: (B, T, C), or (B, T, …, C) where it answers several questions at once; before the softmax.
        certainties: (B, T), float32 or wider, from 0 for an even prediction to 1 for a sure one.
        neurons: (B, T, D), the post-activations.
        attention: (B, T, H, N), how much each feature of the input was attended to; None where not asked for.
    """

    predictions: Float[Tensor, "b t *o"]
    certainties: Float[Tensor, "b t"]
    neurons: Float[Tensor, "b t d"]
    attention: Float[Tensor, "b t h n"] | None

    def most_certain(self) -> Float[Tensor, "b *o"]:
        """The prediction of each input's most certain tick, which the paper scores: (B, …, C)."""
        return self.predictions[torch.arange(len(self.certainties)), self.certainties.argmax(1)]


class Stopped(NamedTuple):
    """What `ContinuousThoughtMachine.think_until` gives for each input.

    Attributes:
        predictions: (B, …, C), of the tick at which it stopped; of the most certain one where it never was sure enough.
        certainties: (B,), of that prediction.
        ticks: (B,) int64, how many were taken.
    """

    predictions: Float[Tensor, "b *o"]
    certainties: Float[Tensor, " b"]
    ticks: Int[Tensor, " b"]


class ThoughtState(NamedTuple):
    """Where a machine stands between two ticks.

    Attributes:
        features: keys and values of the input, which stay.
        history: (B, D, M), the last M pre-activations, the newest last.
        neurons: (B, D), the post-activations z.
        action: sums of the synchronisation that asks.
        output: sums of the synchronisation that answers.
    """

    features: ProjectedMemory
    history: Float[Tensor, "b d m"]
    neurons: Float[Tensor, "b d"]
    action: Sums
    output: Sums

    def of(self, rows: Tensor) -> "ThoughtState":
        """The same for some inputs of the batch.

        Args:
            rows: (B,) bool, or indices of inputs.
        """
        action, output = (Sums(sums.products[rows], sums.weights) for sums in (self.action, self.output))
        features = ProjectedMemory(self.features.keys[rows], self.features.values[rows])
        return ThoughtState(features, self.history[rows], self.neurons[rows], action, output)


class Tick(NamedTuple):
    """What one tick gives.

    Attributes:
        prediction: (B, …, C).
        certainty: (B,).
        attention: (B, H, N), or None where not asked for.
        state: where the machine then stands.
    """

    prediction: Float[Tensor, "b *o"]
    certainty: Float[Tensor, " b"]
    attention: Float[Tensor, "b h n"] | None
    state: ThoughtState


class ContinuousThoughtMachine(nn.Module):
    """Features of an input -> a prediction and a certainty at every tick.

        machine = ContinuousThoughtMachine(49, 10, ticks=12, memory=8)     # features (B, N, 49), ten classes
        thoughts = machine(torch.rand(3, 16, 49))
        loss = two_tick_loss(thoughts.predictions, thoughts.certainties, torch.tensor([4, 0, 9]))
        machine.think_until(torch.rand(3, 16, 49), 0.8).ticks              # fewer ticks where it is sure

    Args:
        d_features: width of a feature.
        out: C, the number of classes; or a shape whose last number is C, such as (16, 2) for 16 answers of yes or no.
        d_model: D, how many neurons.
        d_input: width of the attention, and of what it gives to the synapses.
        n_heads: heads of the attention, a divisor of d_input.
        ticks: T, where a call does not say.
        memory: M, how many pre-activations a neuron's model reads.
        action: the synchronisation that asks for features; a number for that many random pairs.
        output: the synchronisation that is read as the prediction; likewise.
        backbone: makes features (B, N, d_features) of what `forward` is given; a module's weights are trained along.
            None where features are given.
        synapses: makes the synapses, given the width of their input and D; such as `partial(UNetSynapses, levels=3)`.
        neurons: makes the neuron-level models, given D and M; such as `partial(NeuronModels, d_hidden=16)`.
        op: what joins queries, keys and values, as in `MultiHeadAttention`.

    Raises:
        TypeError: action or output is neither a number nor a Synchronisation.
        ValueError: sizes below 1, fewer than two classes, heads that do not divide d_input, more pairs than there are,
            or a synchronisation over neurons that do not exist.
    """

    no_weight_decay: ClassVar[tuple[str, ...]] = ("first_history",)

    backbone: Callable[[Any], Tensor] | None
    out: tuple[int, ...]
    d_features: int
    ticks: int
    to_features: nn.Sequential
    action: Synchronisation
    output: Synchronisation
    to_query: nn.Linear
    attention: MultiHeadAttention
    synapses: nn.Module
    neurons: nn.Module
    to_prediction: nn.Linear
    first_neurons: nn.Parameter
    first_history: nn.Parameter

    def __init__(
        self,
        d_features: int,
        out: int | Sequence[int],
        *,
        d_model: int = 128,
        d_input: int = 32,
        n_heads: int = 1,
        ticks: int = 16,
        memory: int = 8,
        action: int | Synchronisation = 64,
        output: int | Synchronisation = 128,
        backbone: Callable[[Any], Tensor] | None = None,
        synapses: Callable[[int, int], nn.Module] = Synapses,
        neurons: Callable[[int, int], nn.Module] = NeuronModels,
        op: Callable[..., Any] = softmax_attention,
    ):
        super().__init__()
        check_counts(d_features=d_features, d_model=d_model, d_input=d_input, ticks=ticks, memory=memory)
        self.out = (out,) if isinstance(out, int) else tuple(out)
        check_counts(**{f"out[{i}]": size for i, size in enumerate(self.out)})
        if not self.out or self.out[-1] < 2:
            raise ValueError(f"out must be a number of classes, 2 or more, or end with one, got {out!r}")
        self.d_features, self.ticks, self.backbone = d_features, ticks, backbone
        self.to_features = nn.Sequential(nn.Linear(d_features, d_input), nn.LayerNorm(d_input))
        self.action = _synchronisation("action", action, d_model)
        self.output = _synchronisation("output", output, d_model)
        self.to_query = nn.Linear(self.action.size, d_input)
        self.attention = MultiHeadAttention(d_input, n_heads, op=op)
        self.synapses = synapses(d_input + d_model, d_model)
        self.neurons = neurons(d_model, memory)
        self.to_prediction = nn.Linear(self.output.size, math.prod(self.out))
        self.first_neurons = nn.Parameter(torch.empty(d_model).uniform_(-1, 1) / math.sqrt(d_model))
        self.first_history = nn.Parameter(torch.empty(d_model, memory).uniform_(-1, 1) / math.sqrt(d_model + memory))

    def begin(self, x: Any) -> ThoughtState:
        """The state before the first tick: the input's keys and values, and what was learned as a beginning.

        Args:
            x: features (B, N, d_features), or what the backbone makes them of.

        Raises:
            TypeError: features that are not a tensor.
            ValueError: features of another rank or width.
        """
        features = x if self.backbone is None else self.backbone(x)
        name = "x" if self.backbone is None else "what backbone gives"
        check_tensors({name: features})
        if features.ndim != 3 or features.shape[-1] != self.d_features:
            raise ValueError(f"{name} must be (B, N, {self.d_features}), got {tuple(features.shape)}")
        batch = features.shape[0]
        neurons = self.first_neurons.expand(batch, -1)
        _, output = self.output(neurons, self.output.new_state(batch))  # z^1 counts in both synchronisations
        return ThoughtState(
            self.attention.project(self.to_features(features)),
            self.first_history.expand(batch, -1, -1),
            neurons,
            self.action.new_state(batch),
            output,
        )

    def tick(self, state: ThoughtState, *, return_attention: bool = False) -> Tick:
        """One tick.

        Args:
            state: from `begin`, or of the tick before.
            return_attention: also return the weights of the attention.
        """
        # --8<-- [start:tick]
        asked, action = self.action(state.neurons, state.action)
        query = self.to_query(asked)[:, None]  # (B, 1, d_input)
        seen = self.attention(query, state.features, return_weights=return_attention)
        # weights (B, H, 1, N)
        seen, weights = seen if isinstance(seen, tuple) else (seen, None)
        pre_activation = self.synapses(torch.cat([seen[:, 0], state.neurons], -1))  # (B, D)
        # (B, D, M)
        history = torch.cat([state.history[..., 1:], pre_activation[..., None]], -1)
        neurons = self.neurons(history)  # (B, D)
        answered, output = self.output(neurons, state.output)
        prediction = self.to_prediction(answered).unflatten(-1, self.out)
        # --8<-- [end:tick]
        state = ThoughtState(state.features, history, neurons, action, output)
        return Tick(prediction, certainty(prediction), None if weights is None else weights[:, :, 0], state)

    def forward(self, x: Any, *, ticks: int | None = None, return_attention: bool = False) -> Thoughts:
        """All ticks, whatever the certainty.

        Args:
            x: features (B, N, d_features), or what the backbone makes them of.
            ticks: T, which may differ from that of training; as the machine was made where left out.
            return_attention: also return the weights of the attention.

        Returns:
            Predictions, certainties, the neurons and, if asked for, the attention of every tick.

        Raises:
            TypeError: features that are not a tensor.
            ValueError: features of another rank or width, or ticks below 1.
        """
        ticks = self.ticks if ticks is None else ticks
        check_counts(ticks=ticks)
        state, taken = self.begin(x), []
        for _ in range(ticks):
            taken.append(self.tick(state, return_attention=return_attention))
            state = taken[-1].state
        return Thoughts(
            torch.stack([tick.prediction for tick in taken], 1),
            torch.stack([tick.certainty for tick in taken], 1),
            torch.stack([tick.state.neurons for tick in taken], 1),
            torch.stack([tick.attention for tick in taken], 1) if return_attention else None,
        )

    def think_until(self, x: Any, threshold: float, *, ticks: int | None = None) -> Stopped:
        """Stop for each input at the first tick whose certainty reaches a threshold; the others go on without it.

        An input that has stopped costs nothing more. Where the threshold is never reached, the prediction is that of
        the most certain tick, as `Thoughts.most_certain` gives it. How many inputs go on depends on the numbers, so
        that torch.compile breaks its graph at every tick.

        Args:
            x: features (B, N, d_features), or what the backbone makes them of.
            threshold: the certainty that is enough; above 1 for none.
            ticks: how many there are at the most; as the machine was made where left out.

        Raises:
            TypeError: features that are not a tensor.
            ValueError: features of another rank or width, ticks below 1, or a threshold that is not a number.
        """
        ticks = self.ticks if ticks is None else ticks
        check_counts(ticks=ticks)
        if math.isnan(threshold):
            raise ValueError("threshold must be a number, got nan")
        # --8<-- [start:think_until]
        state = self.begin(x)
        going = torch.arange(len(state.neurons), device=state.neurons.device)
        found = self.tick(state)
        predictions, certainties = found.prediction.clone(), found.certainty.clone()
        taken = torch.ones_like(going)
        for tick in range(2, ticks + 1):
            on = ~(found.certainty >= threshold)
            going = going[on]
            if not len(going):
                break
            found = self.tick(found.state.of(on))
            better = found.certainty > certainties[going]
            predictions[going[better]] = found.prediction[better]
            certainties[going[better]] = found.certainty[better]
            taken[going] = tick
        # --8<-- [end:think_until]
        return Stopped(predictions, certainties, taken)

    if TYPE_CHECKING:  # what nn.Module hands on to forward

        def __call__(self, x: Any, *, ticks: int | None = None, return_attention: bool = False) -> Thoughts: ...


def _synchronisation(name: str, given: int | Synchronisation, d_model: int) -> Synchronisation:
    """The synchronisation itself, or one over as many random pairs as a number says."""
    if isinstance(given, Synchronisation):
        last = given.pairs.max().item()
        if last >= d_model:
            raise ValueError(f"{name} must pair neurons 0 to {d_model - 1}, got {last}: make it for d_model={d_model}")
        return given
    if isinstance(given, bool) or not isinstance(given, int):
        raise TypeError(f"{name} must be a number of pairs or a Synchronisation, got {type(given).__name__}")
    check_counts(**{name: given})
    return Synchronisation(random_pairs(d_model, given), d_model)


def certainty(predictions: Float[Tensor, "b *o"]) -> Float[Tensor, " b"]:
    """1 - entropy / log C of the softmax: 0 where all classes are alike, 1 where one has it all (section 3.5).

    Args:
        predictions: (B, …, C) before the softmax; the mean is taken over what stands between.

    Returns:
        (B,), in float32 or better.

    Raises:
        TypeError: predictions is not a tensor.
        ValueError: fewer than two axes, or fewer than two classes.
    """
    check_tensors({"predictions": predictions})
    if predictions.ndim < 2 or predictions.shape[-1] < 2:
        raise ValueError(f"predictions must be (B, …, C) with C of 2 or more, got {tuple(predictions.shape)}")
    # --8<-- [start:certainty]
    logs = at_least_float32(predictions).log_softmax(-1)
    entropy = -(logs.exp() * logs).sum(-1)
    found = 1 - entropy / math.log(predictions.shape[-1])
    # --8<-- [end:certainty]
    return found.flatten(1).mean(1) if found.ndim > 1 else found


def two_tick_loss(
    predictions: Float[Tensor, "b t *o"], certainties: Float[Tensor, "b t"], targets: Int[Tensor, "b *q"]
) -> Float[Tensor, ""]:
    """The mean of two ticks' cross-entropy: of the tick with the lowest, and of the most certain (equation 11).

    Each input has ticks of its own. Which they are passes no gradient.

    Args:
        predictions: (B, T, C) or (B, T, …, C), before the softmax.
        certainties: (B, T).
        targets: (B,) or (B, …) int64, classes.

    Returns:
        A number, in float32 or better.

    Raises:
        TypeError: one of them is not a tensor.
        ValueError: shapes or dtypes that do not fit.
    """
    check_tensors({"predictions": predictions, "certainties": certainties, "targets": targets})
    if predictions.ndim < 3:
        raise ValueError(f"predictions must be (B, T, …, C), got {tuple(predictions.shape)}")
    (batch, ticks, *asked), classes = predictions.shape[:-1], predictions.shape[-1]
    if tuple(certainties.shape) != (batch, ticks):
        raise ValueError(f"certainties must be (B, T) = {(batch, ticks)}, got {tuple(certainties.shape)}")
    if tuple(targets.shape) != (batch, *asked) or targets.dtype != torch.int64:
        raise ValueError(
            f"targets must be {(batch, *asked)} int64, as predictions without ticks and classes, got "
            f"{tuple(targets.shape)} {targets.dtype}"
        )
    # --8<-- [start:loss]
    every = targets[:, None].expand(predictions.shape[:-1]).flatten()
    losses = F.cross_entropy(at_least_float32(predictions).reshape(-1, classes), every, reduction="none")
    losses = losses.view(batch, ticks, -1).mean(-1)  # (B, T)
    best = losses.detach().argmin(1, keepdim=True)
    surest = certainties.argmax(1, keepdim=True)
    return (losses.gather(1, best) + losses.gather(1, surest)).mean() / 2
    # --8<-- [end:loss]
