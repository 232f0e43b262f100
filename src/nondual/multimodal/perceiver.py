"""The Perceiver Resampler: any number of visual vectors in, a fixed number of tokens out.

    latents (R, D) learned  ─ queries ──────────────┐
    features (M, D) + time ─┬─ keys and values ─ attention ─ + ─ feed-forward ─ + ─ …, n_layers times ─ norm -> (R, D)
    latents ────────────────┘

Source: Alayrac et al. 2022 (2204.14198), section 2.1 and figure 5, after Jaegle et al. 2021 (2103.03206). The figure
leaves the norms out: they stand where transformers' Idefics has them, one for the features, one for the latents, one
before each feed-forward network. Symbols: I images or videos of T frames, S vectors a frame of width D, M = T S, R
latents.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nondual.ops.checks import check_sizes, check_tensors
from nondual.self_attention import MultiHeadAttention
from nondual.transformer_layer import normed


class UnbiasedFeedForward(nn.Module):
    """norm, E -> F, GELU, F -> E, neither matrix with a bias: what follows each attention in Flamingo.

    Args:
        d_model: width E.
        d_ff: width F.
        eps: added to the variance in the norm.
    """

    norm: nn.LayerNorm
    linear1: nn.Linear
    linear2: nn.Linear

    def __init__(self, d_model: int, d_ff: int, *, eps: float = 1e-5):
        super().__init__()
        self.norm = nn.LayerNorm(d_model, eps=eps)
        self.linear1 = nn.Linear(d_model, d_ff, bias=False)
        self.linear2 = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Float[Tensor, "b n e"]) -> Float[Tensor, "b n e"]:
        """x (B, N, E) -> (B, N, E); x may be wider than the weights are."""
        return self.linear2(F.gelu(self.linear1(normed(self.norm, x))))

    if TYPE_CHECKING:  # what nn.Module hands on to forward

        def __call__(self, x: Tensor) -> Tensor: ...


class ResamplerLayer(nn.Module):
    """One layer: the latents attend to the features and to themselves, and think at each one.

    Args:
        d_model: width D.
        n_heads: heads.
        d_head: their width.
        d_ff: width of the feed-forward network.
    """

    norm_features: nn.LayerNorm
    norm_latents: nn.LayerNorm
    mixer: MultiHeadAttention
    feed_forward: UnbiasedFeedForward

    def __init__(self, d_model: int, n_heads: int, d_head: int, d_ff: int):
        super().__init__()
        self.norm_features, self.norm_latents = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.mixer = MultiHeadAttention(d_model, n_heads, d_head=d_head, bias=False)
        self.feed_forward = UnbiasedFeedForward(d_model, d_ff)

    def forward(self, latents: Float[Tensor, "i r d"], features: Float[Tensor, "i m d"]) -> Float[Tensor, "i r d"]:
        """latents (I, R, D), features (I, M, D) -> latents (I, R, D)."""
        # --8<-- [start:resampler_layer]
        queries = self.norm_latents(latents)
        memory = torch.cat([self.norm_features(features), queries], 1)  # (I, M + R, D)
        latents = latents + self.mixer(queries, memory)
        return latents + self.feed_forward(latents)
        # --8<-- [end:resampler_layer]

    if TYPE_CHECKING:  # what nn.Module hands on to forward

        def __call__(self, latents: Tensor, features: Tensor) -> Tensor: ...


class PerceiverResampler(nn.Module):
    """Features of an image or a video, however many there are, to R tokens.

        PerceiverResampler(768, 64)                      # images (I, S, 768) -> (I, 64, 768)
        PerceiverResampler(768, 64, n_frames=8)          # videos (I, T, S, 768) too, T up to 8 -> (I, 64, 768)

    Args:
        d_model: width D of the features and of the tokens.
        n_latents: how many tokens come out, R; 64 in the paper.
        n_layers: how many layers; 6 in the paper.
        n_heads: heads of each; 8 there.
        d_head: width of each head; 64 there, whatever D is.
        d_ff: width of the feed-forward networks; 4 D where left out.
        n_frames: for how many frames of a video a time embedding is learned. One, for images, has none.

    Raises:
        ValueError: a number below 1.
    """

    d_model: int
    n_latents: int
    n_frames: int
    latents: nn.Parameter
    time: nn.Parameter | None
    layers: nn.ModuleList
    norm: nn.LayerNorm

    def __init__(
        self,
        d_model: int,
        n_latents: int = 64,
        *,
        n_layers: int = 6,
        n_heads: int = 8,
        d_head: int = 64,
        d_ff: int | None = None,
        n_frames: int = 1,
    ):
        super().__init__()
        check_sizes(d_model=d_model, n_latents=n_latents, n_layers=n_layers, d_head=d_head, n_frames=n_frames)
        self.d_model, self.n_latents, self.n_frames = d_model, n_latents, n_frames
        self.latents = nn.Parameter(torch.randn(n_latents, d_model))
        self.time = nn.Parameter(torch.randn(n_frames, 1, d_model)) if n_frames > 1 else None
        d_ff = 4 * d_model if d_ff is None else d_ff
        self.layers = nn.ModuleList(ResamplerLayer(d_model, n_heads, d_head, d_ff) for _ in range(n_layers))
        self.norm = nn.LayerNorm(d_model)

    def forward(self, features: Float[Tensor, "i s d"] | Float[Tensor, "i t s d"]) -> Float[Tensor, "i r d"]:
        """Features (I, S, D), or of frames (I, T, S, D) -> tokens (I, R, D).

        Args:
            features: floating point, S of 1 or more. Without an axis of frames there is one frame.

        Raises:
            TypeError: features that are not a Tensor.
            ValueError: another rank or width, nothing to read, or more frames than there are time embeddings.
        """
        check_tensors({"features": features})
        if features.ndim not in (3, 4) or features.shape[-1] != self.d_model or not features.is_floating_point():
            raise ValueError(
                f"features must be floating point (I, S, {self.d_model}) or (I, T, S, {self.d_model}), "
                f"got {features.dtype} {tuple(features.shape)}"
            )
        if features.ndim == 3:
            features = features[:, None]
        n_frames = features.shape[1]
        if not 1 <= n_frames <= self.n_frames or features.shape[2] < 1:
            raise ValueError(
                f"features must have 1 to {self.n_frames} frames of 1 vector or more, got {tuple(features.shape)}: "
                "take fewer frames, or make the resampler with a larger n_frames"
            )
        # --8<-- [start:resampler]
        if self.time is not None:
            features = features + self.time[:n_frames]  # (I, T, S, D): when, not where
        features = features.flatten(1, 2)  # (I, M, D)
        latents = self.latents.expand(features.shape[0], -1, -1)  # (I, R, D), whatever M is
        for layer in self.layers:
            latents = layer(latents, features)
        return self.norm(latents)
        # --8<-- [end:resampler]

    def extra_repr(self) -> str:
        """Width, tokens and frames."""
        return f"{self.d_model}, n_latents={self.n_latents}, n_frames={self.n_frames}"

    if TYPE_CHECKING:  # what nn.Module hands on to forward

        def __call__(self, features: Tensor) -> Tensor: ...
