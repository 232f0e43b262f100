"""One layer: mix positions, then think at each one; add what was there before, and normalise.

Source: Vaswani et al. 2017 (1706.03762), sections 3.1 and 3.3; pre-norm: Xiong et al. 2020 (2002.04745). Symbols: x
(B, N, E).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, overload

from jaxtyping import Float
from torch import Tensor, nn

from nondual.mixers import as_before_if_raised
from nondual.residual import LayerScale, StochasticDepth, dropped


class TransformerLayer(nn.Module):
    """A mixer of positions and a feed-forward network, each with a residual path around it.

        post-norm (2017):  x = norm1(x + mixer(x)),   x = norm2(x + feed_forward(x))
        pre-norm:          x = x + mixer(norm1(x)),   x = x + feed_forward(norm2(x))

    Args:
        mixer: any module x -> x over (B, N, E); what `forward` is given besides x goes to it.
        feed_forward: any module x -> x, position by position.
        d_model: width E.
        norm_first: pre-norm if True, as torch's nn.TransformerEncoderLayer names it.
        norm: the norms, called as nn.LayerNorm and nn.RMSNorm are.
        eps: added to the variance or mean square in the norms.
        dropout: probability of dropping a unit of either branch while training.
        drop_path: probability of leaving a whole branch out for a sample while training (stochastic depth).
        layer_scale: what a learned scale of each channel of both branches starts at; None for no such scale.
    """

    mixer: nn.Module
    feed_forward: nn.Module
    norm_first: bool
    norm1: nn.Module
    norm2: nn.Module
    dropout: nn.Dropout
    scale1: LayerScale | None
    scale2: LayerScale | None
    drop_path: StochasticDepth

    def __init__(
        self,
        mixer: nn.Module,
        feed_forward: nn.Module,
        d_model: int,
        *,
        norm_first: bool = False,
        norm: Callable[..., nn.Module] = nn.LayerNorm,
        eps: float = 1e-5,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
    ):
        super().__init__()
        self.mixer, self.feed_forward, self.norm_first = mixer, feed_forward, norm_first
        self.norm1, self.norm2 = norm(d_model, eps=eps), norm(d_model, eps=eps)
        self.dropout = nn.Dropout(dropout)
        self.scale1, self.scale2 = (None if layer_scale is None else LayerScale(d_model, layer_scale) for _ in range(2))
        self.drop_path = StochasticDepth(drop_path)

    def forward(
        self, x: Float[Tensor, "b n e"], *, return_weights: bool = False, **mixing: Any
    ) -> Float[Tensor, "b n e"] | tuple[Float[Tensor, "b n e"], Float[Tensor, "b h n m"]]:
        """x (B, N, E) -> (B, N, E), or with the mixer's weights (B, H, N, M) if asked for.

        Args:
            x: (B, N, E).
            return_weights: also return the mixer's weights; it must take `return_weights=True` itself.
            mixing: given to the mixer as it is: mask, causal, cache. Whatever this call raises, the cache is then as it
                was before.
        """
        if return_weights:  # a mixer without weights need not have this argument
            mixing["return_weights"] = True
        with as_before_if_raised(mixing.get("cache")):
            mixed = self.mixer(self.norm1(x) if self.norm_first else x, **mixing)
            weights: Any = None
            if return_weights:
                mixed, weights = mixed
            x = x + self._added(self.scale1, mixed)
            if not self.norm_first:
                x = self.norm1(x)
            thought = self.feed_forward(self.norm2(x) if self.norm_first else x)
            x = x + self._added(self.scale2, thought)
            if not self.norm_first:
                x = self.norm2(x)
        return (x, weights) if return_weights else x

    def branches(self, **mixing: Any) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """What the layer adds to its residual path, as two functions of x (B, N, E): by its mixer, by its feed-forward
        network. x = x + branch(x) for both, in this order, is the layer. See `nondual.connections`.

        Args:
            mixing: given to the mixer as it is.

        Raises:
            ValueError: a post-norm layer, whose norms stand on the residual path itself.
        """
        if not self.norm_first:
            raise ValueError("norm_first must be True for a layer to be taken apart into branches, got False")

        def mix(x: Tensor) -> Tensor:
            return self._added(self.scale1, self.mixer(self.norm1(x), **mixing))

        def think(x: Tensor) -> Tensor:
            return self._added(self.scale2, self.feed_forward(self.norm2(x)))

        return mix, think

    def _added(self, scale: LayerScale | None, x: Tensor) -> Tensor:
        """What a branch that gave x adds to the residual path."""
        x = dropped(x, self.dropout)
        return dropped(x if scale is None else scale(x), self.drop_path)

    if TYPE_CHECKING:  # what nn.Module hands on to forward

        @overload
        def __call__(self, x: Tensor, *, return_weights: Literal[False] = False, **mixing: Any) -> Tensor: ...

        @overload
        def __call__(self, x: Tensor, *, return_weights: Literal[True], **mixing: Any) -> tuple[Tensor, Tensor]: ...

        @overload
        def __call__(self, x: Tensor, *, return_weights: bool, **mixing: Any) -> Tensor | tuple[Tensor, Tensor]: ...

        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


class MixerBlock(nn.Module):
    """A mixer alone, with its norm before it and a residual path around it: x + mixer(norm(x)).

    Source: Gu and Dao 2023 (2312.00752), figure 3, whose language model is a stack of these.

    Args:
        mixer: any module x -> x over (B, N, E); what `forward` is given besides x goes to it.
        d_model: width E.
        norm: the norm, called as nn.RMSNorm and nn.LayerNorm are.
        eps: added to the mean square or variance in the norm.
    """

    norm: nn.Module
    mixer: nn.Module

    def __init__(
        self, mixer: nn.Module, d_model: int, *, norm: Callable[..., nn.Module] = nn.RMSNorm, eps: float = 1e-5
    ):
        super().__init__()
        self.norm, self.mixer = norm(d_model, eps=eps), mixer

    def forward(self, x: Float[Tensor, "b n e"], **mixing: Any) -> Float[Tensor, "b n e"]:
        """x (B, N, E) -> (B, N, E); what is given besides x goes to the mixer. x may be wider than the weights are."""
        return x + self.mixer(normed(self.norm, x), **mixing)

    def branches(self, **mixing: Any) -> tuple[Callable[[Tensor], Tensor]]:
        """What the block adds to its residual path, as a function of x (B, N, E). See `nondual.connections`.

        Args:
            mixing: given to the mixer as it is.
        """
        return (lambda x: self.mixer(normed(self.norm, x), **mixing),)

    if TYPE_CHECKING:  # what nn.Module hands on to forward

        def __call__(self, x: Tensor, **mixing: Any) -> Tensor: ...


def normed(norm: nn.Module, x: Tensor) -> Tensor:
    """norm(x), x in the dtype of the norm's weight where it has one."""
    weight = getattr(norm, "weight", None)
    return norm(x if weight is None else x.to(weight.dtype))
