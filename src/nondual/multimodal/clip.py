"""CLIP: an image tower and a text tower, trained until an image and its own text point the same way.

    image -> image tower -> projection -> z_image ┐
                                                  ├─ exp(τ) z_image · z_text (+ b in SigLIP)
    text  -> text tower  -> projection -> z_text  ┘

A tower is any module that gives one vector for each of what it is given: `towers` has those of the released models, a
`VisionTransformer` or a `SentenceTower` is one too, and nn.Identity takes vectors that were computed before.

    model = CLIP(image_tower, nn.Identity(), 64, d_image=128, d_text=384)
    adam = optimiser(model, 1e-3)
    adam.register_step_post_hook(lambda *_: model.clamp_scale())
    model.loss(images, text_vectors).backward()

Sources: Radford et al. 2021 (2103.00020), figure 3 and sections 2.3, 2.5 (the scale and its limit), 3.1.2 and 3.1.4
(prompts); Zhai et al. 2023 (2303.15343), section 3.2. Symbols: z unit vectors of width D, τ the log of the scale, b the
bias; I images, T texts, B pairs.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nondual.multimodal.contrastive import sigmoid_loss, similarities, softmax_loss, unit_vectors
from nondual.ops.dtypes import at_least_float32
from nondual.token_ids import has_values


class CLIP(nn.Module):
    """Two towers and a linear projection of each into one space of width D, compared by scaled cosines.

    Args:
        image_tower: what `encode_images` is given -> (I, d_image), floating point.
        text_tower: what `encode_texts` is given -> (T, d_text), floating point.
        d_joint: width D of the space. None for no projections, where both towers give vectors of one width already.
        d_image: width of what the image tower gives.
        d_text: width of what the text tower gives.
        scale: exp(τ) at the start; 1 / 0.07 in the paper.
        largest_scale: what `clamp_scale` keeps exp(τ) to; 100 in the paper.

    Raises:
        ValueError: a width below 1, towers of two widths without projections, or scales not in 0 < scale <= largest.
    """

    image_tower: nn.Module
    text_tower: nn.Module
    image_projection: nn.Module
    text_projection: nn.Module
    log_scale: nn.Parameter
    d_image: int
    d_text: int
    largest_scale: float

    def __init__(
        self,
        image_tower: nn.Module,
        text_tower: nn.Module,
        d_joint: int | None,
        *,
        d_image: int,
        d_text: int,
        scale: float = 1 / 0.07,
        largest_scale: float = 100.0,
    ):
        super().__init__()
        for name, width in (("d_joint", d_joint), ("d_image", d_image), ("d_text", d_text)):
            if width is not None and width < 1:
                raise ValueError(f"{name} must be 1 or more, got {width}")
        if d_joint is None and d_image != d_text:
            raise ValueError(f"d_joint must be given, since d_image={d_image} is not d_text={d_text}: it joins the two")
        if not 0 < scale <= largest_scale < math.inf:
            raise ValueError(f"scale must be above 0 and at most largest_scale, got {scale} and {largest_scale}")
        self.image_tower, self.text_tower = image_tower, text_tower
        self.d_image, self.d_text, self.largest_scale = d_image, d_text, largest_scale
        self.image_projection = _projection(d_image, d_joint)
        self.text_projection = _projection(d_text, d_joint)
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))

    @property
    def scale(self) -> Float[Tensor, ""]:
        """exp(τ), in float32 or better: what cosines are multiplied by; one over the temperature."""
        return at_least_float32(self.log_scale).exp()

    @property
    def shift(self) -> Float[Tensor, ""] | None:
        """b, which is added to every similarity: None, for there is none in CLIP."""
        return None

    def encode_images(self, images: Any) -> Float[Tensor, "i d"]:
        """What the image tower takes -> unit vectors (I, D), in float32 or better.

        Raises:
            TypeError, ValueError: what the tower refuses, or a tower that gives something else than (I, d_image).
        """
        return self._encoded("image", images)

    def encode_texts(self, texts: Any) -> Float[Tensor, "t d"]:
        """What the text tower takes -> unit vectors (T, D), in float32 or better.

        Raises:
            TypeError, ValueError: what the tower refuses, or a tower that gives something else than (T, d_text).
        """
        return self._encoded("text", texts)

    def _encoded(self, kind: str, given: Any) -> Tensor:
        tower, width = getattr(self, f"{kind}_tower"), getattr(self, f"d_{kind}")
        x = tower(given)
        if not isinstance(x, Tensor):
            raise TypeError(f"{kind}_tower must give a Tensor, got {type(x).__name__}")
        if x.ndim != 2 or x.shape[1] != width or not x.is_floating_point():
            raise ValueError(
                f"{kind}_tower must give floating point (B, d_{kind}) = (B, {width}), got {x.dtype} {tuple(x.shape)}"
            )
        return unit_vectors(getattr(self, f"{kind}_projection")(x))

    # --8<-- [start:logits]
    def logits(self, images: Float[Tensor, "i d"], texts: Float[Tensor, "t d"]) -> Float[Tensor, "i t"]:
        """Similarities (I, T) of vectors that `encode_images` and `encode_texts` made.

        Raises:
            TypeError, ValueError: as `nondual.multimodal.contrastive.similarities`.
        """
        return similarities(images, texts, self.scale, self.shift)

    # --8<-- [end:logits]

    def forward(self, images: Any, texts: Any) -> Float[Tensor, "i t"]:
        """Similarities (I, T) of I images and T texts, in float32 or better, under autocast too.

        The softmax of a row says which of the texts an image would choose; that of a column, which image a text would.

        Args:
            images: what the image tower takes.
            texts: what the text tower takes; their number need not be that of the images.

        Raises:
            TypeError, ValueError: as `encode_images` and `encode_texts`.
        """
        return self.logits(self.encode_images(images), self.encode_texts(texts))

    def loss(
        self, images: Any, texts: Any, *, group: "torch.distributed.ProcessGroup | None" = None
    ) -> Float[Tensor, ""]:
        """The symmetric softmax loss of B pairs, `nondual.multimodal.contrastive.softmax_loss`, in nats.

        Args:
            images: what the image tower takes, B of them.
            texts: what the text tower takes, B of them, each belonging to the image of its row.
            group: devices whose pairs are negatives too.

        Raises:
            TypeError, ValueError: what the towers refuse; not as many texts as images, or no pair at all.
        """
        return softmax_loss(self.encode_images(images), self.encode_texts(texts), self.scale, group=group)

    @torch.no_grad()
    def clamp_scale(self) -> None:
        """Keep exp(τ) at most at `largest_scale`: to be called after each step of the optimiser.

        The parameter is clamped, not what is computed from it: a clamp inside the loss would have a gradient of 0 above
        the limit, and the scale could never come back. (open_clip clamps after the step too, and also keeps the scale
        at 1 or more, which the paper does not ask for.)
        """
        self.log_scale.clamp_(max=math.log(self.largest_scale))

    def extra_repr(self) -> str:
        """The largest scale, and where it is now."""
        now = f", scale={float(self.scale.detach()):.4g}" if has_values(self.log_scale) else ""
        return f"largest_scale={self.largest_scale}{now}"

    if TYPE_CHECKING:  # what nn.Module hands on to forward

        def __call__(self, images: Any, texts: Any) -> Tensor: ...


class SigLIP(CLIP):
    """CLIP with a bias and a loss by the sigmoid: each of the B² is asked by itself whether it is a pair.

    Args:
        image_tower: as in `CLIP`.
        text_tower: as in `CLIP`.
        d_joint: as in `CLIP`.
        d_image: as in `CLIP`.
        d_text: as in `CLIP`.
        scale: exp(τ) at the start; 10 in the paper.
        bias: b at the start; -10 in the paper, for all but B of the B² are no pairs.
        largest_scale: what `clamp_scale` keeps exp(τ) to, if it is called; the paper has no limit.

    Raises:
        ValueError: as `CLIP`.
    """

    bias: nn.Parameter

    def __init__(
        self,
        image_tower: nn.Module,
        text_tower: nn.Module,
        d_joint: int | None,
        *,
        d_image: int,
        d_text: int,
        scale: float = 10.0,
        bias: float = -10.0,
        largest_scale: float = 100.0,
    ):
        super().__init__(
            image_tower, text_tower, d_joint, d_image=d_image, d_text=d_text, scale=scale, largest_scale=largest_scale
        )
        self.bias = nn.Parameter(torch.tensor(float(bias)))

    @property
    def shift(self) -> Float[Tensor, ""]:
        """b, in float32 or better."""
        return at_least_float32(self.bias)

    def loss(
        self,
        images: Any,
        texts: Any,
        *,
        group: "torch.distributed.ProcessGroup | None" = None,
        chunk: int | None = None,
    ) -> Float[Tensor, ""]:
        """The sigmoid loss of B pairs, `nondual.multimodal.contrastive.sigmoid_loss`, in nats.

        Args:
            images: what the image tower takes, B of them.
            texts: what the text tower takes, B of them, each belonging to the image of its row.
            group: devices whose pairs are negatives too.
            chunk: how many texts are compared at a time; all where left out.

        Raises:
            TypeError, ValueError: what the towers refuse; not as many texts as images, no pair at all, a chunk below 1.
        """
        z_images, z_texts = self.encode_images(images), self.encode_texts(texts)
        return sigmoid_loss(z_images, z_texts, self.scale, self.shift, chunk=chunk, group=group)


@torch.no_grad()
def zero_shot_weights(model: CLIP, prompts: Sequence[Any]) -> Float[Tensor, "c d"]:
    """A unit vector for each class, made of texts alone: the mean of its prompts' unit vectors, at unit length again.

    Classes may have different numbers of prompts. No gradient is computed, and the model is in evaluation mode
    meanwhile.

    Args:
        model: trained or loaded.
        prompts: for each of C classes what the text tower takes: several texts that name the class.

    Returns:
        (C, D). A class whose prompts point in opposite ways, so that only rounding is left, is 0.

    Raises:
        TypeError: prompts is one tensor or string.
        ValueError: no class, a class without a prompt, or one whose vector is not finite.
    """
    if isinstance(prompts, Tensor | str | bytes) or not isinstance(prompts, Sequence):
        raise TypeError(f"prompts must be a list with the texts of each class, got {type(prompts).__name__}")
    if not len(prompts):
        raise ValueError("prompts must have 1 class or more, got none")
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        return torch.stack([_class_vector(model, number, texts) for number, texts in enumerate(prompts)])
    finally:
        for module, training in modes.items():  # one by one: a frozen tower may be in evaluation mode on its own
            module.training = training


def _class_vector(model: CLIP, number: int, prompts: Any) -> Tensor:
    # --8<-- [start:class_vector]
    z = model.encode_texts(prompts)  # (P, D), a unit vector for each prompt
    total = z.sum(0)  # in the direction of their mean
    rounding = 64 * len(z) * torch.finfo(z.dtype).eps
    total = total.masked_fill(total.norm() < rounding, 0)
    row = z[0] if len(z) == 1 else unit_vectors(total)
    # --8<-- [end:class_vector]
    if not len(z):
        raise ValueError(f"prompts must have a text or more for each class, got none for class {number}")
    if has_values(row) and not row.isfinite().all():
        raise ValueError(f"prompts must have finite vectors, got NaN or infinity in class {number}")
    return row


@torch.no_grad()
def zero_shot_classifier(model: CLIP, prompts: Sequence[Any]) -> nn.Linear:
    """The linear layer that zero-shot classification is: image vectors (I, D) -> a score for each class (I, C).

    Its weights are the scaled vectors of `zero_shot_weights`, and its bias SigLIP's. With one prompt for each class it
    computes what `model.logits` does, operation by operation. Nothing in it is trained, and none of its parameters
    requires a gradient.

        classifier = zero_shot_classifier(model, [["a photo of a cat", "a cat"], ["a photo of a dog", "a dog"]])
        probabilities = classifier(model.encode_images(images)).softmax(-1)

    Args:
        model: as in `zero_shot_weights`.
        prompts: as in `zero_shot_weights`.

    Raises:
        TypeError, ValueError: as `zero_shot_weights`.
    """
    weights = zero_shot_weights(model, prompts)
    # --8<-- [start:zero_shot_classifier]
    weight, shift = model.scale * weights, model.shift
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=shift is not None).to(weight)
    layer.weight.copy_(weight)
    if shift is not None:
        layer.bias.fill_(shift)
    # --8<-- [end:zero_shot_classifier]
    return layer.requires_grad_(False)


class SentenceTower(nn.Module):
    """A sentence encoder that is not trained, as a text tower: strings or vectors computed before -> (T, E).

        tower = SentenceTower(minilm())                         # nondual.pretrained.minilm
        model = CLIP(image_tower, tower, 64, d_image=128, d_text=384)
        model.encode_texts(["a red apple", "a cat"])
        model.encode_texts(tower(["a red apple", "a cat"]))     # the same: the vectors may be made once and kept

    The encoder's weights are no parameters of the model and not in its state_dict.

    Args:
        encoder: has a method encode(sentences) -> (T, E), as `nondual.pretrained.SentenceEncoder`.

    Raises:
        TypeError: encoder has no such method.
    """

    encoder: Any
    like: Tensor

    def __init__(self, encoder: Any):
        super().__init__()
        if not callable(getattr(encoder, "encode", None)) or isinstance(encoder, str):
            raise TypeError(f"encoder must have a method encode(sentences), got {type(encoder).__name__}")
        object.__setattr__(self, "encoder", encoder)  # not registered, even if it is a module
        self.register_buffer("like", torch.empty(0), persistent=False)  # it says the dtype and the device

    def forward(self, texts: Sequence[str] | Float[Tensor, "t e"]) -> Float[Tensor, "t e"]:
        """Strings -> vectors (T, E) without a gradient; a tensor is taken for such vectors, and given back.

        Both come out in the dtype and on the device that the model was moved to.

        Raises:
            TypeError, ValueError: what the encoder refuses.
        """
        if isinstance(texts, Tensor):
            x = texts
        else:
            with torch.no_grad():
                x = self.encoder.encode(texts)
        return x.to(self.like) if x.is_floating_point() else x

    if TYPE_CHECKING:  # what nn.Module hands on to forward

        def __call__(self, texts: Sequence[str] | Tensor) -> Tensor: ...


def _projection(width: int, d_joint: int | None) -> nn.Module:
    """A matrix whose rows have the length 1 on average, as in the released code."""
    if d_joint is None:
        return nn.Identity()
    projection = nn.Linear(width, d_joint, bias=False)
    nn.init.normal_(projection.weight, std=width**-0.5)
    return projection
