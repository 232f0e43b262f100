"""Recognition as the aim of learning: a model is rewarded for naming the stored task that a prompt belongs to.

A prompt holds examples of a function, as in `nondual.language_models.in_context_learning`. To *recognise* is to answer
as the mean of the stored tasks does, each weighed by how well it fits; to *construct* is to answer as ridge regression
does, which knows of no stored task. Which of them a model does is measured, and not argued:

    Recogniser           a regressor that also names the task; its loss adds the reward for the name
    recurring            tasks that come again, some more often than others, and new ones between them
    recognition_index    1 where the answers are those of the stored tasks, -1 where they are those of ridge regression

Sources: retrieval and learning of tasks, Raventós et al. 2023 (2306.15063), whose two predictors these are; the reward
is the essay's proposal. Symbols: B prompts, N examples, D inputs, E width, M stored tasks.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from nondual.language_models.in_context_learning import InContextRegressor, predict, ridge, stored_tasks
from nondual.ops.checks import check_sizes, check_tensors


class Named(NamedTuple):
    """What a `Recogniser` says: answers (B, N), and scores (B, N, M + 1) of the tasks, the last of "none of these"."""

    answers: Tensor
    names: Tensor


class Recogniser(nn.Module):
    """A regressor, and one linear layer that names the task of the prompt at each of its questions.

        model = Recogniser(InContextRegressor(5, 64, 3, 4), n_tasks=16)
        loss = model.loss(x, y, which, reward=0.1)

    With a reward of 0 the loss is that of the regressor, and its parameters get the same gradients to the bit.

    Args:
        regressor: what reads the examples.
        n_tasks: M, how many tasks are stored.

    Raises:
        TypeError: regressor is not an InContextRegressor.
        ValueError: n_tasks below 1.
    """

    regressor: InContextRegressor
    names: nn.Linear
    n_tasks: int

    def __init__(self, regressor: InContextRegressor, n_tasks: int):
        super().__init__()
        if not isinstance(regressor, InContextRegressor):
            raise TypeError(f"regressor must be an InContextRegressor, got {type(regressor).__name__}")
        check_sizes(n_tasks=n_tasks)
        self.regressor, self.n_tasks = regressor, n_tasks
        self.names = nn.Linear(regressor.read_out.in_features, n_tasks + 1)

    def forward(self, x: Float[Tensor, "b n d"], y: Float[Tensor, "b n"]) -> Named:
        """Answers (B, N) and scores of the tasks (B, N, M + 1), each from the examples before its question.

        Args:
            x: (B, N, D).
            y: (B, N).

        Raises:
            TypeError, ValueError: as in `InContextRegressor`.
        """
        read = self.regressor.read(x, y)
        return Named(self.regressor.read_out(read)[..., 0], self.names(read))

    if TYPE_CHECKING:  # what nn.Module hands on to forward

        def __call__(self, x: Tensor, y: Tensor) -> Named: ...

    def loss(
        self, x: Float[Tensor, "b n d"], y: Float[Tensor, "b n"], which: Int[Tensor, " b"], *, reward: float
    ) -> Float[Tensor, ""]:
        """The mean squared error of the answers, and `reward` times the cross-entropy of the name, in nats.

        The name is asked for at every question but the first, before which there is no example.

        Args:
            x: (B, N, D).
            y: (B, N).
            which: for each prompt its task, 0 to M - 1, or M for none of them.
            reward: 0 or more.

        Raises:
            TypeError: an argument is not a tensor.
            ValueError: what the regressor refuses; which of another shape, kind or range; a negative reward.
        """
        check_tensors({"x": x, "y": y, "which": which})
        if not reward >= 0:
            raise ValueError(f"reward must be 0 or more, got {reward}")
        if which.shape != x.shape[:1] or which.is_floating_point() or which.dtype == torch.bool:
            raise ValueError(
                f"which must be integers (B,) = {tuple(x.shape[:1])}, got {which.dtype} {tuple(which.shape)}"
            )
        if which.numel() and not 0 <= int(which.min()) <= int(which.max()) <= self.n_tasks:
            raise ValueError(f"which must lie in 0 to {self.n_tasks}, the last for none, got {which.tolist()}")
        said = self(x, y)
        error = (said.answers - y).square().mean()
        if reward == 0 or x.shape[1] < 2:
            return error
        # --8<-- [start:reward]
        names = said.names[:, 1:]
        wanted = which.long()[:, None].expand(names.shape[:2])
        return error + reward * F.cross_entropy(names.flatten(0, 1), wanted.flatten())
        # --8<-- [end:reward]


def zipf(count: int, exponent: float = 1.0) -> Float[Tensor, " m"]:
    """How often each of some tasks comes, by Zipf's law: in proportion to 1 / rank^exponent; 0 for all alike.

    Args:
        count: M.
        exponent: 0 or more.

    Raises:
        ValueError: a count below 1, or a negative exponent.
    """
    check_sizes(count=count)
    if not exponent >= 0:
        raise ValueError(f"exponent must be 0 or more, got {exponent}")
    shares = torch.arange(1, count + 1, dtype=torch.float64) ** -exponent
    return (shares / shares.sum()).float()


def recurring(
    batch: int,
    tasks: Float[Tensor, "m d"],
    *,
    shares: Float[Tensor, " m"] | Sequence[float] | None = None,
    new: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, "b d"], Int[Tensor, " b"]]:
    """Tasks of a batch of prompts: stored ones, by their shares, and new ones between them.

    Args:
        batch: B.
        tasks: M vectors of weights (M, D).
        shares: how often each of them comes, not negative and not all 0; all alike where left out.
        new: the share of prompts whose task is drawn anew, every weight normal with variance 1/D.
        generator: where the randomness comes from.

    Returns:
        (weights (B, D), which (B,)): the stored task, or M for a new one.

    Raises:
        TypeError: tasks is not a tensor.
        ValueError: a batch below 1, tasks that are not (M, D), shares that do not fit, new outside of [0, 1].
    """
    check_sizes(batch=batch)
    check_tensors({"tasks": tasks})
    if tasks.ndim != 2 or not tasks.numel():
        raise ValueError(f"tasks must be (M, D), both 1 or more, got {tuple(tasks.shape)}")
    if not 0 <= new <= 1:
        raise ValueError(f"new must lie in [0, 1], got {new}")
    often = torch.ones(len(tasks)) if shares is None else torch.as_tensor(shares, dtype=torch.float32)
    if often.shape != tasks.shape[:1] or not bool((often >= 0).all()) or not bool(often.sum() > 0):
        raise ValueError(f"shares must be {len(tasks)} numbers, not negative and not all 0, got {often.tolist()}")
    which = torch.multinomial(often, batch, replacement=True, generator=generator)
    fresh = torch.randn(batch, tasks.shape[1], generator=generator) / tasks.shape[1] ** 0.5
    is_new = torch.rand(batch, generator=generator) < new
    weights = torch.where(is_new[:, None], fresh.to(tasks.dtype), tasks[which])
    return weights, which.masked_fill(is_new, len(tasks))


def recognition_index(
    said: Float[Tensor, "b n"],
    x: Float[Tensor, "b n d"],
    y: Float[Tensor, "b n"],
    tasks: Float[Tensor, "m d"],
    *,
    noise: float,
) -> Float[Tensor, " n"]:
    """r = (d_ridge - d_stored) / (d_ridge + d_stored) for each number of examples, from -1 to 1.

    d is the mean over the prompts of the squared distance of what was said from what each predictor says. Ridge
    regression is the exact mean for tasks whose weights are normal with variance 1/D. Where both say the same, r is 0.

    Args:
        said: a model's answers (B, N).
        x: (B, N, D).
        y: (B, N).
        tasks: M vectors of weights (M, D).
        noise: the standard deviation of the noise in y, above 0.

    Returns:
        (N,): at place i after i examples.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: shapes that do not fit, or a noise not above 0.
    """
    check_tensors({"said": said})
    recalled = predict(stored_tasks(x, y, tasks, noise), x)
    constructed = predict(ridge(x, y, x.shape[2] * noise**2), x)
    if said.shape != recalled.shape:
        raise ValueError(f"said must be (B, N) = {tuple(recalled.shape)}, got {tuple(said.shape)}")
    # --8<-- [start:index]
    d_stored = (said - recalled).square().mean(0)
    d_ridge = (said - constructed).square().mean(0)
    both = d_ridge + d_stored
    return (d_ridge - d_stored) / both.masked_fill(both == 0, 1)
    # --8<-- [end:index]
