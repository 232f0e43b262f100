"""The Vision Transformer: an image is cut into patches, and a transformer reads them as it reads words.

Sources: Dosovitskiy et al. 2020 (2010.11929), equations 1 to 4; the distillation token, Touvron et al. 2020
(2012.12877), section 4; registers, Darcet et al. 2023 (2309.16588), section 2.2. Symbols: images (B, C, H, W), P the
side of a patch, N = H W / P² patches, E width, S tokens before the patches (class, distillation, registers).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, get_args, overload

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nondual.feed_forward import FeedForward
from nondual.ops.attention import attention
from nondual.transformer import Encoder
from nondual.vision_transformers.patches import (
    PatchEmbedding,
    Size,
    check_finite,
    check_images,
    check_whole,
    grid_code,
    is_grid,
    pair,
    resampled,
)

Pool = Literal["class", "mean", "class and mean"]
Positions = Literal["learned", "fixed", "none"]


class VisionTransformer(nn.Module):
    """Images to classes: patches, a class token, learned positions, pre-norm layers, a linear head.

        VisionTransformer()                                                           # ViT-Base/16: 86,567,656 weights
        VisionTransformer(28, 7, 10, d_model=48, n_heads=4, d_ff=96, n_layers=3, n_channels=1)
        VisionTransformer(pool="mean", class_token=False)                             # no class token

    The layers are `nondual.transformer.Encoder`'s: the same that read words.

    Args:
        image_size: H = W of the images in training, or (H, W); it decides how many positions are learned.
        patch_size: P, or (height, width) of a patch; it divides image_size.
        n_classes: how many classes; 0 for no head, so that the model gives E numbers for an image.
        d_model: width E.
        n_heads: heads H of each layer.
        d_ff: feed-forward width F.
        n_layers: how many layers.
        n_channels: C of the images.
        pool: what the head reads: "class" token, the "mean" over the patches, or "class and mean" side by side, 2 E
            numbers, as DINOv2's linear classifiers.
        class_token: whether a learned vector stands before the patches.
        distilled: whether a second such token, with a head of its own, follows it (DeiT). In training `forward` gives
            the scores of both heads, in evaluation their mean.
        n_registers: learned vectors without positions, after these tokens, which the head does not read.
        positions: what tells one patch from another: a "learned" vector for each, "fixed" sines of its row and column
            (`patches.grid_code`; 0 for the class and distillation tokens), or "none", for a set of patches.
        antialias: how positions of a smaller grid are made, as in `patches.resampled`.
        dropout: of the embedded patches, the weights and both branches, while training.
        drop_path: stochastic depth, as in `Encoder`.
        layer_scale: as in `Encoder`.
        activation: of the feed-forward networks.
        eps: added to the variance in the norms.
        op: what joins queries, keys and values, as in `nondual.self_attention.MultiHeadAttention`.
        mixer: makes the mixer of one layer, given E, in place of attention, as in `Encoder`.
        feed_forward: makes the feed-forward networks, called as `FeedForward` is.

    Attributes:
        positions: (1 or 2 or 0 + N, E), those of class and distillation token first; a parameter if they are learned.
        distillation_head: None where distilled is False; set to None, the model scores by the class token alone.

    Raises:
        ValueError: sizes that are no positive integers, a patch that does not divide the image, an unknown pool or kind
            of positions, a pool that reads a class token where there is none, a distillation token without a class
            token, fixed positions of a width that is no multiple of 4, or what `Encoder` refuses.
    """

    image_size: tuple[int, int]
    pool: Pool
    n_registers: int
    patches: PatchEmbedding
    class_token: nn.Parameter | None
    distillation_token: nn.Parameter | None
    registers: nn.Parameter | None
    positions: Tensor
    antialias: bool
    dropout: nn.Dropout
    encoder: Encoder
    head: nn.Module
    distillation_head: nn.Module | None

    def __init__(
        self,
        image_size: Size = 224,
        patch_size: Size = 16,
        n_classes: int = 1000,
        *,
        d_model: int = 768,
        n_heads: int = 12,
        d_ff: int = 3072,
        n_layers: int = 12,
        n_channels: int = 3,
        pool: Pool = "class",
        class_token: bool = True,
        distilled: bool = False,
        n_registers: int = 0,
        positions: Positions = "learned",
        antialias: bool = False,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        activation: Callable[[Tensor], Tensor] = F.gelu,
        eps: float = 1e-6,
        op: Callable[..., Any] = attention,
        mixer: Callable[[int], nn.Module] | None = None,
        feed_forward: Callable[..., nn.Module] = FeedForward,
    ):
        super().__init__()
        self.image_size, (high, wide) = pair("image_size", image_size), pair("patch_size", patch_size)
        if self.image_size[0] % high or self.image_size[1] % wide:
            raise ValueError(f"patch_size must divide image_size={self.image_size}, got {(high, wide)}")
        if pool not in get_args(Pool):
            raise ValueError(f"pool must be one of {', '.join(map(repr, get_args(Pool)))}, got {pool!r}")
        if positions not in get_args(Positions):
            raise ValueError(f"positions must be one of {', '.join(map(repr, get_args(Positions)))}, got {positions!r}")
        if not class_token and (pool != "mean" or distilled):
            raise ValueError('class_token=False needs pool="mean" and distilled=False: no other token is read')
        if distilled and pool != "class":
            raise ValueError(f'distilled=True needs pool="class", got {pool!r}')
        if n_registers < 0 or n_classes < 0:
            raise ValueError(f"n_registers and n_classes must be 0 or more, got {n_registers} and {n_classes}")
        self.pool, self.n_registers, self.antialias = pool, n_registers, antialias
        self.patches = PatchEmbedding((high, wide), d_model, n_channels=n_channels)
        self.class_token = nn.Parameter(torch.zeros(d_model)) if class_token else None
        self.distillation_token = nn.Parameter(torch.zeros(d_model)) if distilled else None
        self.registers = nn.Parameter(torch.zeros(n_registers, d_model)) if n_registers else None
        if positions == "learned":
            self.positions = nn.Parameter(torch.zeros(class_token + distilled + self.n_patches, d_model))
        else:
            code = grid_code(*self.grid, d_model) if positions == "fixed" else torch.zeros(self.n_patches, d_model)
            own = torch.zeros(class_token + distilled, d_model)
            self.register_buffer("positions", torch.cat([own, code]))
        self.dropout = nn.Dropout(dropout)
        self.encoder = Encoder(
            d_model,
            n_heads,
            d_ff,
            n_layers,
            norm_first=True,
            activation=activation,
            eps=eps,
            dropout=dropout,
            op=op,
            mixer=mixer,
            feed_forward=feed_forward,
            drop_path=drop_path,
            layer_scale=layer_scale,
        )
        read = 2 * d_model if pool == "class and mean" else d_model
        self.head = nn.Linear(read, n_classes) if n_classes else nn.Identity()
        self.distillation_head = None
        if distilled:
            self.distillation_head = nn.Linear(d_model, n_classes) if n_classes else nn.Identity()
        for learned in (self.class_token, self.distillation_token, self.registers, self.positions):
            if isinstance(learned, nn.Parameter):
                nn.init.trunc_normal_(learned, std=0.02)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches of an image of image_size."""
        high, wide = self.patches.patch_size
        return self.image_size[0] // high, self.image_size[1] // wide

    @property
    def n_patches(self) -> int:
        """N for an image of image_size."""
        return self.grid[0] * self.grid[1]

    @property
    def n_special(self) -> int:
        """S, how many tokens stand before the patches: class, distillation, registers."""
        return sum(token is not None for token in (self.class_token, self.distillation_token)) + self.n_registers

    def positions_at(self, rows: int, columns: int) -> Float[Tensor, "n e"]:
        """The positions for a grid of patches, those of class and distillation token first, without registers.

        Positions of another grid than the model's own are interpolated from it: `patches.resampled`.
        """
        own, to = self.positions.shape[0] - self.n_patches, (rows, columns)
        if is_grid(self.grid, to):
            return self.positions
        patches = resampled(self.positions[own:], self.grid, to, antialias=self.antialias)
        return torch.cat([self.positions[:own], patches])

    def embed(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n e"]:
        """The input of the first layer, (B, S + N, E): equation 1, and the registers.

        Args:
            images: (B, C, H, W) of the weights' dtype, or any that autocast casts; sides that the patch divides.

        Raises:
            TypeError: images are not a tensor.
            ValueError: not floating point (B, C, H, W), another number of channels, sides of no whole patches, or a
                number that is not finite, where values can be looked at.
        """
        check_images(images, self.patches.n_channels)
        check_whole(images, self.patches.patch_size)
        check_finite(images)
        # --8<-- [start:embed]
        x = self.patches(images)  # (B, N, E)
        before = [token for token in self._before() if token is not None]
        tokens = [token.expand(x.shape[0], 1, -1) for token in before]
        x = torch.cat([*tokens, x], 1) + self.positions_at(*self.patches.grid(images))
        if self.registers is not None:  # they have no place in the image
            registers = self.registers.expand(x.shape[0], -1, -1)
            x = torch.cat([x[:, : len(tokens)], registers, x[:, len(tokens) :]], 1)
        return self.dropout(x)
        # --8<-- [end:embed]

    def _before(self) -> tuple[nn.Parameter | None, nn.Parameter | None]:
        return self.class_token, self.distillation_token

    @overload
    def features(self, images: Tensor, *, return_weights: Literal[False] = False) -> Tensor: ...

    @overload
    def features(self, images: Tensor, *, return_weights: Literal[True]) -> tuple[Tensor, Tensor]: ...

    def features(
        self, images: Float[Tensor, "b c h w"], *, return_weights: bool = False
    ) -> Float[Tensor, "b n e"] | tuple[Float[Tensor, "b n e"], Float[Tensor, "layers b h n n"]]:
        """The vectors after the last norm, (B, S + N, E): class token, distillation token, registers, patches.

        Args:
            images: as in `embed`.
            return_weights: also return every layer's weights (layers, B, H, S + N, S + N).

        Raises:
            TypeError, ValueError: as `embed`.
        """
        return self.encoder(self.embed(images), return_weights=return_weights)

    def pooled(self, features: Float[Tensor, "b n e"]) -> Float[Tensor, "b d"]:
        """What the head reads of the features (B, S + N, E): (B, E), or (B, 2 E) for "class and mean"."""
        if self.pool == "class":
            return features[:, 0]
        mean = features[:, self.n_special :].mean(1)
        return mean if self.pool == "mean" else torch.cat([features[:, 0], mean], -1)

    def forward(self, images: Float[Tensor, "b c h w"], *, return_weights: bool = False) -> Any:
        """images (B, C, H, W) -> scores (B, n_classes); with distilled=True in training, those of both heads.

        Args:
            images: as in `embed`.
            return_weights: also return every layer's weights (layers, B, H, S + N, S + N).

        Raises:
            TypeError, ValueError: as `embed`.
        """
        weights: Tensor | None = None
        if return_weights:
            x, weights = self.features(images, return_weights=True)
        else:
            x = self.features(images)
        scores: Any = self.head(self.pooled(x))
        if self.distillation_head is not None:
            second = self.distillation_head(x[:, 1])
            scores = (scores, second) if self.training else (scores + second) / 2
        return (scores, weights) if return_weights else scores

    if TYPE_CHECKING:  # what nn.Module hands on to forward

        @overload
        def __call__(self, images: Tensor, *, return_weights: Literal[False] = False) -> Tensor: ...

        @overload
        def __call__(self, images: Tensor, *, return_weights: Literal[True]) -> tuple[Tensor, Tensor]: ...

        @overload
        def __call__(self, images: Tensor, *, return_weights: bool) -> Tensor | tuple[Tensor, Tensor]: ...

        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
