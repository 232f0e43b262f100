"""Two sets of vectors, images and texts in pairs: unit length, similarities, and the losses that pull pairs together.

    similarity  s_ij = exp(τ) z_i · z_j (+ b)                   z_i an image, z_j a text, both of unit length
    softmax     the mean over i of -log softmax_j(s_ij)[i], and the same over texts, halved       CLIP
    sigmoid     (1/B) Σ_ij -log sigmoid(t_ij s_ij),  t_ij = 1 for a pair, else -1                 SigLIP

With a process group each device holds its own pairs, and the other devices' vectors are the negatives: the mean of the
devices' losses is the loss of the whole batch on one device, and gradients averaged over the devices, as
DistributedDataParallel averages them, are its gradients.

Sources: Radford et al. 2021 (2103.00020), figure 3; Zhai et al. 2023 (2303.15343), sections 3.2 and 3.3, algorithm 1.
Symbols: B pairs, D the width of both, I images, T texts, τ the log of the scale, b the bias.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nondual.ops.autocast import autocast_off
from nondual.ops.checks import check_tensors
from nondual.ops.dtypes import accumulation_dtype, at_least_float32

dist = torch.distributed


def unit_vectors(x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    """Each vector scaled to length 1, in float32 or better; a vector of zeros stays 0 and has a gradient of 0.

    Vectors of any finite size keep their direction: each is first divided by its largest entry, so that no square
    overflows or vanishes. NaN stays NaN.

    Args:
        x: (..., D), any floating dtype.

    Raises:
        TypeError: x is not a tensor.
        ValueError: x is not floating point, or has no width.
    """
    check_tensors({"x": x})
    if not x.is_floating_point() or not x.ndim or not x.shape[-1]:
        raise ValueError(f"x must be floating point (..., D) with D of 1 or more, got {x.dtype} {tuple(x.shape)}")
    # --8<-- [start:unit_vectors]
    x = at_least_float32(x)
    largest = x.detach().abs().amax(-1, keepdim=True)
    zero = largest == 0
    x = x / largest.masked_fill(zero, 1)
    square = x.square().sum(-1, keepdim=True)
    return (x * square.masked_fill(zero, 1).rsqrt()).masked_fill(zero, 0)
    # --8<-- [end:unit_vectors]


def similarities(
    images: Float[Tensor, "i d"], texts: Float[Tensor, "t d"], scale: Tensor | float, bias: Tensor | float | None = None
) -> Float[Tensor, "i t"]:
    """exp(τ) z_i · z_j (+ b) for each image and each text: a linear layer whose weights are the scaled texts.

    Computed in float32 or better, also under autocast.

    Args:
        images: (I, D), of unit length where cosines are wanted.
        texts: (T, D).
        scale: exp(τ), one number.
        bias: b, one number; none where left out.

    Raises:
        TypeError: images or texts is not a tensor.
        ValueError: not floating point (I, D) and (T, D) of one width.
    """
    images, texts = _matrices(images, texts)
    with autocast_off(images.device.type):
        # --8<-- [start:similarities]
        weight = scale * texts  # (T, D)
        if bias is None:
            return F.linear(images, weight)
        return F.linear(images, weight, torch.as_tensor(bias).to(weight).expand(texts.shape[0]))
        # --8<-- [end:similarities]


def softmax_loss(
    images: Float[Tensor, "b d"],
    texts: Float[Tensor, "b d"],
    scale: Tensor | float,
    *,
    group: "torch.distributed.ProcessGroup | None" = None,
) -> Float[Tensor, ""]:
    """CLIP's loss: each image has to choose its text among all texts, each text its image among all images.

    The mean of two cross-entropies, in nats; ln B where all similarities are equal. NaN in one vector makes it NaN.

    Args:
        images: (B, D), row i belonging to row i of texts.
        texts: (B, D).
        scale: exp(τ).
        group: devices whose pairs are negatives too, each with as many pairs; every one of them has to make the call.
            This device alone where left out.

    Returns:
        A number in float32 or better: with a group, this device's share, whose mean over the devices is the loss.

    Raises:
        TypeError: images or texts is not a tensor.
        ValueError: not floating point (B, D) of one shape, no pair at all, or devices with other numbers of pairs.
    """
    images, texts = _pairs(images, texts, group)
    if group is None:
        # --8<-- [start:softmax_loss]
        logits = similarities(images, texts, scale)  # (B, B), an image in each row
        right = torch.arange(images.shape[0], device=images.device)  # image i goes with text i
        return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2
        # --8<-- [end:softmax_loss]
    first = dist.get_rank(group) * images.shape[0]
    right = torch.arange(first, first + images.shape[0], device=images.device)
    all_images, all_texts = gathered(images, group), gathered(texts, group)
    of_images = F.cross_entropy(similarities(images, all_texts, scale), right)
    of_texts = F.cross_entropy(similarities(texts, all_images, scale), right)
    return (of_images + of_texts) / 2


def sigmoid_loss(
    images: Float[Tensor, "b d"],
    texts: Float[Tensor, "b d"],
    scale: Tensor | float,
    bias: Tensor | float,
    *,
    chunk: int | None = None,
    group: "torch.distributed.ProcessGroup | None" = None,
) -> Float[Tensor, ""]:
    """SigLIP's loss: whether an image and a text are a pair is asked of each of the B² by itself.

    The sum over all B² of -log sigmoid(± similarity), divided by B. Since no pair depends on another, it can be summed
    in chunks: with `chunk`, B x chunk similarities are in memory at once, forward and backward, in place of B x B, and
    each is computed twice. NaN in one vector makes it NaN.

    Args:
        images: (B, D), row i belonging to row i of texts.
        texts: (B, D).
        scale: exp(τ).
        bias: b; at the start the paper's -10, so that most of the B² are right from the beginning.
        chunk: how many texts are compared at a time, 1 or more; all of a device's where left out.
        group: as in `softmax_loss`; only texts are exchanged.

    Returns:
        A number in float32 or better: with a group, this device's share, whose mean over the devices is the loss.

    Raises:
        TypeError: images or texts is not a tensor.
        ValueError: as `softmax_loss`, or a chunk below 1.
    """
    if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
        raise ValueError(f"chunk must be an integer of 1 or more, or None for all at once, got {chunk!r}")
    images, texts = _pairs(images, texts, group)
    first = 0
    if group is not None:  # the pairs of this device's images are among all texts from here on
        first, chunk = dist.get_rank(group) * images.shape[0], chunk or images.shape[0]
        texts = gathered(texts, group)
    if chunk is None:
        return _binary(images, texts, scale, bias, first) / images.shape[0]
    total = images.new_zeros(())
    for start in range(0, texts.shape[0], chunk):
        some = texts[start : start + chunk]
        total = total + checkpoint(_binary, images, some, scale, bias, first - start, use_reentrant=False)
    return total / images.shape[0]


# --8<-- [start:sigmoid_loss]
def _binary(images: Tensor, texts: Tensor, scale: Tensor | float, bias: Tensor | float, first: int) -> Tensor:
    """The sum of -log sigmoid(± similarity) over (I, T); text first + i is the pair of image i, if it is there."""
    logits = similarities(images, texts, scale, bias)
    column = torch.arange(texts.shape[0], device=texts.device)
    row = torch.arange(images.shape[0], device=images.device)[:, None]
    pair = column == row + first
    return -F.logsigmoid(torch.where(pair, logits, -logits)).sum()


# --8<-- [end:sigmoid_loss]


def gathered(x: Float[Tensor, "b d"], group: "torch.distributed.ProcessGroup") -> Float[Tensor, "all d"]:
    """Every device's rows, in the order of their ranks; a gradient of any of them goes back to where it came from.

    Args:
        x: (B, D), of one shape on every device of the group.
        group: every one of its devices has to make the call.
    """
    return _Gather.apply(x, group)  # pyright: ignore[reportReturnType] apply is not typed


class _Gather(torch.autograd.Function):
    """All-gather, whose derivative adds up what each device asks of these rows."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, *gradients):
        (total,) = gradients
        total = total.contiguous().clone()  # it is added to in place
        dist.all_reduce(total, group=ctx.group)
        return total.chunk(dist.get_world_size(ctx.group))[dist.get_rank(ctx.group)], None


def _matrices(images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
    """Images and texts in one dtype, float32 or wider; refused where they are no vectors of one width."""
    check_tensors({"images": images, "texts": texts})
    for name, x in (("images", images), ("texts", texts)):
        if x.ndim != 2 or not x.is_floating_point():
            raise ValueError(f"{name} must be vectors, floating point (B, D), got {x.dtype} {tuple(x.shape)}")
    if images.shape[1] != texts.shape[1]:
        raise ValueError(f"texts must have the width of images, D={images.shape[1]}, got {texts.shape[1]}")
    wide = accumulation_dtype(images.dtype, texts.dtype)
    return images.to(wide), texts.to(wide)


def _pairs(images: Tensor, texts: Tensor, group: "torch.distributed.ProcessGroup | None") -> tuple[Tensor, Tensor]:
    """The same, and refused where they are no pairs; with a group, by every device of it, so that none waits."""
    images, texts = _matrices(images, texts)
    sizes = [(images.shape[0], texts.shape[0])]
    if group is not None:
        mine = torch.tensor(sizes[0], device=images.device)
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, mine, group)
        sizes = [(int(i), int(t)) for i, t in parts]
        if len(set(sizes)) > 1:
            raise ValueError(f"every device of a group must have as many images and texts, got {sizes}")
    i, t = sizes[0]
    if i != t:
        raise ValueError(f"texts must be as many as images, one for each, got {t} for {i}")
    if i == 0:
        raise ValueError("a batch must have 1 pair or more, got none")
    return images, texts
