"""The towers of the released models: a transformer over patches, a transformer over tokens, one vector from each.

    CLIP     patches and a class token -> norm -> layers -> norm -> the class token's vector
             tokens -> causal layers -> norm -> the vector of the end-of-text token, which alone has seen the whole text
    SigLIP   patches -> layers -> norm -> a learned query attends to them all (`AttentionPool`)
             tokens -> layers -> norm -> the last token's vector -> a linear layer

Sources: Radford et al. 2021 (2103.00020), sections 2.4 and 2.5; Zhai et al. 2023 (2303.15343), section 4; the pooling,
Zhai et al. 2022 (2106.04560), section 3.2, after Lee et al. 2019 (1810.00825), section 3.2. Symbols: B images or texts,
N patches or tokens, E width, F feed-forward width.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor, nn

from nondual.feed_forward import FeedForward
from nondual.ops.attention import attention
from nondual.ops.checks import check_tensors
from nondual.positional_encoding import LearnedPositions
from nondual.self_attention import MultiHeadAttention
from nondual.token_ids import check_ids, has_values
from nondual.transformer import Encoder
from nondual.vision_transformers.patches import check_images, resampled


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x), the approximation of GELU that CLIP was trained with: 1606.08415, section 2."""
    return x * torch.sigmoid(1.702 * x)


# --- which token stands for the text ---------------------------------------------------------------------------------


def at_highest_id(ids: Integer[Tensor, "b n"]) -> Integer[Tensor, " b"]:
    """Where each text has its highest id, the first if there are several: in CLIP's vocabulary that is end-of-text."""
    return ids.argmax(1)


def at_last(ids: Integer[Tensor, "b n"]) -> Integer[Tensor, " b"]:
    """The last place, padding or not: SigLIP's texts are padded to one length, and the model learnt to read that."""
    return torch.full_like(ids[:, 0], ids.shape[1] - 1)


class FirstOf:
    """Where each text has a token for the first time; what follows it may be anything, as padding with the same token.

    Args:
        token: the id that ends each text.
    """

    token: int

    def __init__(self, token: int):
        self.token = token

    def __call__(self, ids: Integer[Tensor, "b n"]) -> Integer[Tensor, " b"]:
        """(B, N) -> the places (B,).

        Raises:
            ValueError: a text without the token, where values can be looked at.
        """
        here = ids == self.token
        if has_values(ids) and not here.any(1).all():
            row = int((~here.any(1)).nonzero()[0])
            raise ValueError(f"ids must have the end-of-text token {self.token} in each row, got none in row {row}")
        return here.int().argmax(1)

    def __repr__(self) -> str:
        return f"FirstOf({self.token})"


class TextTower(nn.Module):
    """Token ids to one vector for each text: embeddings, pre-norm layers, the vector at one place.

    Args:
        vocabulary: how many token ids there are.
        max_len: the longest text, in tokens.
        d_model: width E.
        n_heads: heads H of each layer.
        d_ff: feed-forward width F.
        n_layers: how many layers.
        place: which token stands for the text: ids (B, N) -> places (B,). `at_highest_id`, `FirstOf` or `at_last`.
        causal: no token sees a later one, so that padding after the place counts for nothing; as CLIP, unlike SigLIP.
        activation: of the feed-forward networks; `quick_gelu` in CLIP.
        eps: added to the variance in the norms.
        head: applied to the vector, E -> whatever it gives; a linear layer in SigLIP, nothing in CLIP.
        op: what joins queries, keys and values, as in `nondual.self_attention.MultiHeadAttention`.
    """

    vocabulary: int
    token: nn.Embedding
    position: LearnedPositions
    encoder: Encoder
    head: nn.Module
    place: Callable[[Tensor], Tensor]

    def __init__(
        self,
        vocabulary: int,
        max_len: int,
        d_model: int,
        n_heads: int,
        d_ff: int,
        n_layers: int,
        *,
        place: Callable[[Tensor], Tensor] = at_highest_id,
        causal: bool = True,
        activation: Callable[[Tensor], Tensor] = quick_gelu,
        eps: float = 1e-5,
        head: nn.Module | None = None,
        op: Callable[..., Any] = attention,
    ):
        super().__init__()
        self.vocabulary = vocabulary
        self.token = nn.Embedding(vocabulary, d_model)
        self.position = LearnedPositions(max_len, d_model)
        self.encoder = Encoder(
            d_model, n_heads, d_ff, n_layers, norm_first=True, activation=activation, eps=eps, causal=causal, op=op
        )
        self.head = nn.Identity() if head is None else head
        self.place = place
        nn.init.normal_(self.token.weight, std=0.02)
        nn.init.normal_(self.position.table.weight, std=0.01)
        start_as_clip(self.encoder)

    def features(self, ids: Integer[Tensor, "b n"]) -> Float[Tensor, "b n e"]:
        """The vector of each token after the last norm, (B, N, E).

        Args:
            ids: (B, N), any integer dtype, N at least 1 and at most max_len.

        Raises:
            TypeError: ids are not a tensor.
            ValueError: ids that are not integers (B, N), one out of range, no token, or a text of more than max_len.
        """
        return self._features(self._checked(ids))

    def forward(self, ids: Integer[Tensor, "b n"]) -> Float[Tensor, "b e"]:
        """ids (B, N) -> one vector for each text (B, E), or of the head's width.

        Raises:
            TypeError, ValueError: as `features`, and what `place` refuses.
        """
        ids = self._checked(ids)
        x = self._features(ids)
        # --8<-- [start:text_place]
        place = self.place(ids)  # (B,)
        x = x[torch.arange(x.shape[0], device=x.device), place]
        # --8<-- [end:text_place]
        return self.head(x)

    def _features(self, ids: Tensor) -> Tensor:
        return self.encoder(self.token(ids) + self.position(ids.shape[1]))

    def _checked(self, ids: Tensor) -> Tensor:
        ids = check_ids("ids", ids, self.vocabulary)
        longest = self.position.longest
        if not 1 <= ids.shape[1] <= longest:
            raise ValueError(f"ids must have 1 to {longest} tokens in a row, got {ids.shape[1]}: shorten the texts")
        return ids

    if TYPE_CHECKING:  # what nn.Module hands on to forward

        def __call__(self, ids: Tensor) -> Tensor: ...


# --- images ----------------------------------------------------------------------------------------------------------


class VisionTower(nn.Module):
    """Images to one vector each: patches, learned positions, pre-norm layers, and what `pool` makes of them.

    Args:
        image_size: height and width of the images in pixels. What the last whole patch leaves over at the right and at
            the lower edge is not read, as in SigLIP's 384 pixels with patches of 14.
        patch_size: height and width of a patch.
        d_model: width E.
        n_heads: heads H of each layer.
        d_ff: feed-forward width F.
        n_layers: how many layers.
        n_channels: of the images.
        class_token: whether a learned vector stands before the patches; as CLIP, unlike SigLIP.
        norm_before: whether a norm stands before the layers; as CLIP, unlike SigLIP.
        patch_bias: whether the patches' projection has a bias; as SigLIP, unlike CLIP.
        pool: what makes one vector of all, (B, N, E) -> (B, E); the first of them, the class token's, where left out.
        activation: of the feed-forward networks; `quick_gelu` in CLIP.
        eps: added to the variance in the norms.
        op: what joins queries, keys and values, as in `nondual.self_attention.MultiHeadAttention`.

    Raises:
        ValueError: a patch_size that is not in 1 to image_size, or neither a class token nor a pool.
    """

    image_size: int
    patch_size: int
    patches: nn.Conv2d
    class_token: nn.Parameter | None
    position: nn.Parameter
    norm_before: nn.Module
    encoder: Encoder
    pool: Callable[[Tensor], Tensor]

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        d_model: int,
        n_heads: int,
        d_ff: int,
        n_layers: int,
        *,
        n_channels: int = 3,
        class_token: bool = True,
        norm_before: bool = True,
        patch_bias: bool = False,
        pool: nn.Module | None = None,
        activation: Callable[[Tensor], Tensor] = quick_gelu,
        eps: float = 1e-5,
        op: Callable[..., Any] = attention,
    ):
        super().__init__()
        if not 1 <= patch_size <= image_size:
            raise ValueError(f"patch_size must be 1 to image_size={image_size}, got {patch_size}")
        if not class_token and pool is None:
            raise ValueError(
                "pool must be given without a class token, such as AttentionPool: what stands for the image?"
            )
        self.image_size, self.patch_size = image_size, patch_size
        self.patches = nn.Conv2d(n_channels, d_model, patch_size, stride=patch_size, bias=patch_bias)
        self.class_token = nn.Parameter(d_model**-0.5 * torch.randn(d_model)) if class_token else None
        n = class_token + (image_size // patch_size) ** 2
        self.position = nn.Parameter(d_model**-0.5 * torch.randn(n, d_model))
        self.norm_before = nn.LayerNorm(d_model, eps=eps) if norm_before else nn.Identity()
        self.encoder = Encoder(d_model, n_heads, d_ff, n_layers, norm_first=True, activation=activation, eps=eps, op=op)
        self.pool = first_vector if pool is None else pool
        start_as_clip(self.encoder)

    def features(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n e"]:
        """The vectors after the last norm (B, N, E): the class token's, if there is one, then those of the patches.

        Args:
            images: (B, C, H, W) of the weights' dtype, or any that autocast casts. H and W are image_size, or multiples
                of patch_size: the positions are then resampled bicubically.

        Raises:
            TypeError: images are not a tensor.
            ValueError: not floating point (B, C, H, W), another number of channels, or a side of no whole patches.
        """
        return self.encoder(self.embed(images))

    def embed(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n e"]:
        """images (B, C, H, W) -> what the first layer reads (B, N, E): patches with their positions, normed if CLIP's.

        Raises:
            TypeError, ValueError: as `features`.
        """
        self._check(images)
        # --8<-- [start:vision_features]
        x = self.patches(images)  # (B, E, rows, columns)
        rows, columns = x.shape[2:]
        x = x.flatten(2).mT  # (B, N, E)
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(x.shape[0], 1, -1), x], 1)
        return self.norm_before(x + self.positions(rows, columns))
        # --8<-- [end:vision_features]

    def positions(self, rows: int, columns: int) -> Float[Tensor, "n e"]:
        """The learned positions of a grid of patches, (N, E), the class token's first: resampled for another grid."""
        side, own = self.image_size // self.patch_size, 0 if self.class_token is None else 1
        if (rows, columns) == (side, side):
            return self.position
        return torch.cat([self.position[:own], resampled(self.position[own:], (side, side), (rows, columns))])

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b e"]:
        """images (B, C, H, W) -> one vector for each (B, E).

        Raises:
            TypeError, ValueError: as `features`.
        """
        return self.pool(self.features(images))

    def _check(self, images: Tensor) -> None:
        check_images(images, self.patches.in_channels)
        height, width = images.shape[2:]
        for side in (height, width):
            if side != self.image_size and (side % self.patch_size or not side):
                raise ValueError(
                    f"images must be {self.image_size} pixels high and wide, or multiples of the patch size "
                    f"{self.patch_size}, got {height} x {width}: resize or crop them"
                )

    if TYPE_CHECKING:  # what nn.Module hands on to forward

        def __call__(self, images: Tensor) -> Tensor: ...


class AttentionPool(nn.Module):
    """One vector out of many: a learned query attends to all of them, and a feed-forward network follows.

        x = attention(query, features),   x + feed_forward(norm(x))

    Args:
        d_model: width E.
        n_heads: heads H.
        d_ff: feed-forward width F.
        activation: of the feed-forward network.
        eps: added to the variance in the norm.
    """

    query: nn.Parameter
    mixer: MultiHeadAttention
    norm: nn.LayerNorm
    feed_forward: FeedForward

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        d_ff: int,
        *,
        activation: Callable[[Tensor], Tensor] = F.gelu,
        eps: float = 1e-6,
    ):
        super().__init__()
        self.query = nn.Parameter(torch.empty(1, 1, d_model))
        nn.init.xavier_uniform_(self.query)
        self.mixer = MultiHeadAttention(d_model, n_heads)
        self.norm = nn.LayerNorm(d_model, eps=eps)
        self.feed_forward = FeedForward(d_model, d_ff, activation=activation)

    def forward(self, features: Float[Tensor, "b n e"]) -> Float[Tensor, "b e"]:
        """(B, N, E) -> (B, E).

        Raises:
            TypeError, ValueError: features that are not a tensor (B, N, E).
        """
        check_tensors({"features": features})
        if features.ndim != 3:
            raise ValueError(f"features must be (B, N, E), got {tuple(features.shape)}")
        # --8<-- [start:attention_pool]
        query = self.query.expand(features.shape[0], -1, -1)  # the same for every image
        x = self.mixer(query, features)  # (B, 1, E)
        return (x + self.feed_forward(self.norm(x)))[:, 0]
        # --8<-- [end:attention_pool]

    if TYPE_CHECKING:  # what nn.Module hands on to forward

        def __call__(self, features: Tensor) -> Tensor: ...


def first_vector(features: Float[Tensor, "b n e"]) -> Float[Tensor, "b e"]:
    """The class token's vector."""
    return features[:, 0]


@torch.no_grad()
def start_as_clip(encoder: Encoder) -> None:
    """Weights as CLIP's released code draws them: what adds to the residual path is smaller the deeper the stack.

    Args:
        encoder: of layers with attention; other mixers are left as they are.
    """
    n_layers = len(encoder.layers)
    for layer in encoder.layers:
        mixer, network = layer.mixer, layer.feed_forward
        if isinstance(mixer, MultiHeadAttention) and isinstance(network, FeedForward):
            width = mixer.q_proj.in_features
            for projection in (mixer.q_proj, mixer.k_proj, mixer.v_proj):
                nn.init.normal_(projection.weight, std=width**-0.5)
            for last in (mixer.out_proj, network.linear2):
                nn.init.normal_(last.weight, std=width**-0.5 * (2 * n_layers) ** -0.5)
            nn.init.normal_(network.linear1.weight, std=(2 * width) ** -0.5)
            for projection in (mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.out_proj):
                nn.init.zeros_(projection.bias)
