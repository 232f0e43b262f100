"""Two clouds in one space: how far apart images and texts lie, whether a plane tells them apart, what closing it does.

    gap         the mean of the images' unit vectors minus that of the texts'
    close_gap   each cloud moved along the gap towards the other, and put back on the unit sphere
    probe       how often a linear classifier that saw other pairs says rightly whether a vector is an image or a text

Source: Liang et al. 2022 (2203.02053), sections 2.1 and 4.2. Symbols: I images, T texts, D the width of the space.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nondual.multimodal.contrastive import unit_vectors
from nondual.ops.checks import check_tensors


class ModalityGap(NamedTuple):
    """Where two clouds of unit vectors lie.

    Attributes:
        vector: (D,), the images' centroid minus the texts'.
        distance: its length, between 0 and 2.
        images_cosine: the mean cosine of two different images; NaN where there is one alone.
        texts_cosine: the mean cosine of two different texts; NaN where there is one alone.
    """

    vector: Float[Tensor, " d"]
    distance: float
    images_cosine: float
    texts_cosine: float


def modality_gap(images: Float[Tensor, "i d"], texts: Float[Tensor, "t d"]) -> ModalityGap:
    """The gap between the centroids, and how narrow a cone each cloud fills.

    Args:
        images: (I, D), scaled to unit length here.
        texts: (T, D), which need not be as many.

    Raises:
        TypeError: images or texts is not a tensor.
        ValueError: not floating point (I, D) and (T, D) of one width, none at all, or numbers that are not finite.
    """
    images, texts = _clouds(images, texts)
    vector = images.mean(0) - texts.mean(0)
    return ModalityGap(vector, float(vector.norm()), _mean_cosine(images), _mean_cosine(texts))


def close_gap(
    images: Float[Tensor, "i d"], texts: Float[Tensor, "t d"], share: float = 1.0
) -> tuple[Float[Tensor, "i d"], Float[Tensor, "t d"]]:
    """Both clouds moved towards each other by half a share of the gap, then scaled to unit length again.

    A share of 1 puts both centroids on one point before the scaling; 0 changes nothing, and below 0 the gap grows.

    Args:
        images: as in `modality_gap`.
        texts: as in `modality_gap`.
        share: of the gap; in the paper 2λ.

    Returns:
        Images (I, D) and texts (T, D), in float64.

    Raises:
        TypeError, ValueError: as `modality_gap`.
    """
    vector = modality_gap(images, texts).vector
    images, texts = _clouds(images, texts)
    return unit_vectors(images - share / 2 * vector), unit_vectors(texts + share / 2 * vector)


def probe_modality(
    images: Float[Tensor, "i d"], texts: Float[Tensor, "t d"], *, folds: int = 5, ridge: float = 1e-3, seed: int = 0
) -> float:
    """The accuracy of a linear classifier, image or text, on pairs that it was not fitted to.

    Logistic regression with an intercept, on coordinates of standard deviation 1. Image i and text i are always in the
    same fold, so that no pair is on both sides of the split. 0.5 is chance.

    Args:
        images: (N, D).
        texts: (N, D), text i of image i.
        folds: in how many parts the pairs are split, each left out once; 2 or more.
        ridge: the loss is the mean over the vectors plus ridge / 2 times the squared weights; above 0.
        seed: of the split.

    Raises:
        TypeError, ValueError: as `modality_gap`; not as many texts as images, fewer pairs than folds, fewer than 2
            folds, or a ridge not above 0.
    """
    images, texts = _clouds(images, texts)
    if len(images) != len(texts):
        raise ValueError(f"texts must be as many as images, one for each, got {len(texts)} for {len(images)}")
    if not 2 <= folds <= len(images):
        raise ValueError(f"folds must be 2 or more and at most the pairs, got {folds} for {len(images)}")
    if not ridge > 0:
        raise ValueError(f"ridge must be above 0, or a plane between two clouds has no best one, got {ridge}")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).to(images.device)
    right = 0
    for fold in order.tensor_split(folds):
        kept = torch.ones(len(images), dtype=torch.bool, device=images.device)
        kept[fold] = False
        weight, offset = _separate(images[kept], texts[kept], ridge)
        right += int((images[fold] @ weight + offset > 0).sum()) + int((texts[fold] @ weight + offset < 0).sum())
    return right / (2 * len(images))


def _separate(images: Tensor, texts: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """The plane z · weight + offset = 0 of logistic regression, images on its positive side."""
    # --8<-- [start:separate]
    x = torch.cat([images, texts])
    label = torch.cat([torch.ones(len(images)), -torch.ones(len(texts))]).to(x)
    mean, spread = x.mean(0), x.std(0).clamp(min=1e-12)
    x = (x - mean) / spread
    plane = torch.zeros(x.shape[1] + 1).to(x).requires_grad_()
    newton = torch.optim.LBFGS([plane], max_iter=200, tolerance_grad=1e-8, line_search_fn="strong_wolfe")

    @torch.enable_grad()
    def loss() -> Tensor:
        newton.zero_grad()
        value = F.softplus(-label * (x @ plane[:-1] + plane[-1])).mean() + ridge / 2 * plane[:-1].square().sum()
        value.backward()
        return value

    newton.step(loss)  # pyright: ignore[reportArgumentType] a loss may be a tensor
    weight = plane.detach()[:-1] / spread
    return weight, plane.detach()[-1] - mean @ weight
    # --8<-- [end:separate]


def _mean_cosine(x: Tensor) -> float:
    """The mean of z_i · z_j over i other than j: |Σ z|² is the sum over all i and j, |z_i|² that over i = j."""
    n = len(x)
    return float((x.sum(0).square().sum() - x.square().sum()) / (n * (n - 1))) if n > 1 else float("nan")


def _clouds(images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
    """Both as unit vectors in float64, refused where they do not fit."""
    check_tensors({"images": images, "texts": texts})
    for name, x in (("images", images), ("texts", texts)):
        if x.ndim != 2 or not x.is_floating_point() or not len(x):
            raise ValueError(f"{name} must be 1 vector or more, floating point (B, D), got {x.dtype} {tuple(x.shape)}")
        if not x.isfinite().all():
            raise ValueError(f"{name} must be finite, got NaN or infinity")
    if images.shape[1] != texts.shape[1]:
        raise ValueError(f"texts must have the width of images, D={images.shape[1]}, got {texts.shape[1]}")
    return unit_vectors(images.detach().double()), unit_vectors(texts.detach().double())
