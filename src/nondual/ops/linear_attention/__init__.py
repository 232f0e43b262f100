"""Linear attention: a sum over all earlier positions that is kept in a state of fixed size, and read by each query.

    S_t = exp(g_t) S_{t-1} + k_t v_tᵀ,   out_t = scale · S_tᵀ q_t

and with `beta` the delta rule, which writes the difference from what the key reads already:

    S_t = exp(g_t) S_{t-1} + β_t k_t (v_t - exp(g_t) S_{t-1}ᵀ k_t)ᵀ

One formula for a family: without g and β the linear attention of Katharopoulos et al. 2020 (2006.16236), whose feature
map the caller applies to q and k; with a fixed g of each head the retention of RetNet (Sun et al. 2023, 2307.08621);
with a g of each head and step the scan of Mamba-2 (Dao and Gu 2024, 2405.21060; `nondual.ops.ssd` is the same with
k = B, q = C, v = Δ x and g = Δ A); with a g of each channel GLA (Yang et al. 2023, 2312.06635); with β DeltaNet (Schlag
et al. 2021, 2102.11174; Yang et al. 2024, 2406.06484), and with both Gated DeltaNet (2412.06464, equation 10: the state
decays first, then it is read and written).

Symbols: B batch, H heads, G key/value heads, N steps, D width of queries and keys, Dv of values. The state is (D, Dv):
its rows are the key's channels.

Engines (`ENGINES` is their table, with their limits):

- "reference": step by step in plain torch.
- "parallel": by its matrix, N x N, in plain torch.
- "chunked": by chunks, in plain torch: the matrix within a chunk, a recurrence between chunks; time and memory linear
  in N.
- "triton": our kernels. On CUDA tensors; on CPU tensors only in Triton's interpreter (TRITON_INTERPRET=1 set before
  triton is imported), and slowly.

All but "triton" take any floating dtype, and are differentiable any number of times and in forward mode. "auto" takes
"triton" for CUDA tensors unless a limit of it is in the way, and "chunked" for all others.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nondual.ops.autocast import as_autocast_does, autocast_off
from nondual.ops.checks import check_chunk, check_kinds, check_shapes, check_tensors
from nondual.ops.dtypes import at_least_float32
from nondual.ops.impl import (
    KERNEL_DTYPES,
    Engine,
    Limit,
    Preference,
    choose,
    needs_triton,
    refuses_transforms,
    runs_kernels,
    takes_chunks,
    takes_dtypes,
)
from nondual.ops.linear_attention import chunked, parallel, reference
from nondual.ops.linear_attention.inputs import Inputs

WIDEST = 256  # the widest queries, keys and values that the kernels take
KERNEL_CHUNKS = (16, 32, 64, 128, 256)
Impl = Literal["auto", "reference", "parallel", "chunked", "triton"]


def linear_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m dv"],
    *,
    log_decay: Float[Tensor, "..."] | None = None,
    beta: Float[Tensor, "b h n"] | None = None,
    normalise: bool = False,
    causal: bool = True,
    scale: float = 1.0,
    state: Float[Tensor, "b h d dv_"] | None = None,
    reset: Bool[Tensor, "b n"] | None = None,
    chunk: int | None = None,
    impl: Impl = "auto",
) -> tuple[Float[Tensor, "b h n dv"], Float[Tensor, "b h d dv_"]]:
    """The outputs of every step and the state after the last, which the next call may go on from.

        S_t = exp(g_t) S_{t-1} + k_t v_tᵀ                                       out_t = scale · S_tᵀ q_t
        S_t = exp(g_t) S_{t-1} + β_t k_t (v_t - exp(g_t) S_{t-1}ᵀ k_t)ᵀ         with beta

    A feature map is applied by the caller, to q and k (`nondual.efficient_attention.feature_maps`). Splitting a
    sequence and handing on the state gives the same as the whole. States and sums are kept in float32 (in float64 for
    float64) whatever q is. Under autocast q, k and v are cast to its dtype.

    Args:
        q: queries (B, H, N, D), any floating dtype that the engine knows, in any layout; N may be 0.
        k: keys (B, G, N, D), in q's dtype. H must be a multiple of G: neighbouring heads share keys and values. Without
            causal there may be another number of keys, M.
        v: values (B, G, N, Dv), in q's dtype; Dv may differ from D.
        log_decay: g, the log of the decay before each step's write, of any floating dtype: (H,) one for each head,
            (B, H, N) one for each head and step, or (B, H, N, D) one for each channel of the keys too. 0 keeps the
            state, -inf forgets it; below -1000 it has no gradient. Above 0 the state grows, and the plain torch engines
            are right as long as the growth within one chunk is finite. For each channel it cannot go with beta.
        beta: β, how much of the difference is written (B, H, N), of any floating dtype; with keys of length 1, from 0
            (nothing) over 1 (the key then reads v_t exactly) to below 2. Makes this the delta rule.
        normalise: divide out_t by the sum of its weights, scale · q_t · Σ k_s (decayed as the state is). The sum is
            kept as one more column of the state. Where it is 0 the output is 0. Not with beta.
        causal: no position sees a later one. Without it every query reads the sum over all keys, which takes no
            log_decay, beta or reset: they have an order.
        scale: factor on q · k; softmax attention's 1/√D is not the default here.
        state: the state before the first step (B, H, D, Dv), or (B, H, D, Dv + 1) with normalise; zero where left out.
        reset: True at the first step of each of several sequences packed along N: there all that came before is
            forgotten, a NaN included, and an initial state as well. In the gradients of "parallel" and "chunked" a NaN
            in the incoming gradient can still reach any step of its own chunk. Without reset, a NaN or inf can reach
            any step of its own chunk there, earlier ones too.
        chunk: steps of a chunk for "chunked", 1 or more (a power of two is taken, the next above, where each channel
            decays), and "triton"; the engine's own where left out. The result does not depend on it but for rounding.
        impl: "auto", "reference", "parallel", "chunked" or "triton".

    Returns:
        out (B, H, N, Dv) in q's dtype, and the last state (B, H, D, Dv), or (B, H, D, Dv + 1) with normalise, in
        float32 (float64 for float64), in memory of its own. Both are differentiable with respect to every floating
        argument.

    Raises:
        TypeError: what is not a tensor.
        ValueError: shapes, dtypes or devices that do not fit, options that cannot go together, or what the engine asked
            for does not hold; an unknown engine; a chunk below 1.
        RuntimeError: "triton" asked for where triton is missing, for a forward-mode derivative, or under a transform of
            torch.func. A second derivative through it.
    """
    return run(checked(q, k, v, log_decay, beta, normalise, causal, scale, state, reset, chunk), impl)


def checked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    normalise: bool = False,
    causal: bool = True,
    scale: float = 1.0,
    state: Tensor | None = None,
    reset: Tensor | None = None,
    chunk: int | None = None,
) -> Inputs:
    """Refuse arguments that do not fit together; the others in the form that the engines take.

    The arguments are those of `linear_attention`.

    Raises:
        TypeError: what is not a tensor.
        ValueError: shapes, dtypes or devices that do not fit, or options that cannot go together; a chunk below 1.
    """
    check_tensors({"q": q, "k": k, "v": v}, {"log_decay": log_decay, "beta": beta, "state": state, "reset": reset})
    q, k, v = as_autocast_does(q, k, v)
    given = Inputs(q, k, v, log_decay, beta, bool(normalise), bool(causal), float(scale), state, reset, chunk)
    _check(given)
    return given


def run(given: Inputs, impl: Impl) -> tuple[Tensor, Tensor]:
    """The outputs and the last state, of inputs that fit together: what the door returns.

    Args:
        given: from `checked`.
        impl: as in `linear_attention`.

    Raises:
        ValueError: as `linear_attention`.
        RuntimeError: likewise.
    """
    engine = choose(impl, ENGINES, given)
    if 0 in (given.q.numel(), given.k.numel(), given.v.numel()):  # nothing to cut or launch
        engine = ENGINES["reference"]
    return engine.run(given)


def linear_attention_step(
    q: Float[Tensor, "b h d"],
    k: Float[Tensor, "b g d"],
    v: Float[Tensor, "b g dv"],
    *,
    log_decay: Float[Tensor, "..."] | None = None,
    beta: Float[Tensor, "b h"] | None = None,
    normalise: bool = False,
    scale: float = 1.0,
    state: Float[Tensor, "b h d dv_"] | None = None,
) -> tuple[Float[Tensor, "b h dv"], Float[Tensor, "b h d dv_"]]:
    """One step of `linear_attention`, for decoding: time and memory do not depend on how many steps came before.

    In plain torch on every device: one step is the recurrence itself, and has no chunk to cut.

    Args:
        q: query (B, H, D).
        k: key (B, G, D).
        v: value (B, G, Dv).
        log_decay: (H,), (B, H) or (B, H, D).
        beta: (B, H).
        normalise: as in `linear_attention`.
        scale: factor on q · k.
        state: (B, H, D, Dv), or (B, H, D, Dv + 1) with normalise; zero where left out.

    Returns:
        out (B, H, Dv) and the new state.

    Raises:
        TypeError: what is not a tensor.
        ValueError: as `linear_attention`.
    """
    check_tensors({"q": q, "k": k, "v": v}, {"log_decay": log_decay, "beta": beta})
    if not q.ndim == k.ndim == v.ndim == 3 or (beta is not None and beta.ndim != 2):
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v, beta) if x is not None)
        raise ValueError(
            f"q must be (B, H, D), k (B, G, D), v (B, G, Dv) and beta (B, H), for one step, got {shapes}; "
            "linear_attention takes whole sequences"
        )
    if log_decay is not None and log_decay.ndim > 1:
        log_decay = log_decay.unsqueeze(2)
    beta = None if beta is None else beta.unsqueeze(2)
    q, k, v = (x.unsqueeze(2) for x in (q, k, v))
    out, state = linear_attention(
        q,
        k,
        v,
        log_decay=log_decay,
        beta=beta,
        normalise=normalise,
        scale=scale,
        state=state,
        impl="reference",
    )
    return out.squeeze(2), state


def linear_attention_matrix(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g n d"],
    *,
    log_decay: Float[Tensor, "..."] | None = None,
    beta: Float[Tensor, "b h n"] | None = None,
    normalise: bool = False,
    scale: float = 1.0,
    reset: Bool[Tensor, "b n"] | None = None,
) -> Float[Tensor, "b h n n"]:
    """The matrix M with `linear_attention(q, k, v, …)[0] = M v`, from a state of zero.

    Its entries are what softmax attention calls weights. They may be negative, and a row sums to 1 only with
    `normalise`. Under autocast q and k are taken as they are.

    Args:
        q: (B, H, N, D).
        k: (B, G, N, D).
        log_decay: as in `nondual.ops.linear_attention.linear_attention`.
        beta: likewise.
        normalise: likewise.
        scale: likewise.
        reset: likewise.

    Returns:
        M (B, H, N, N), in float32 or better: rows are the steps that read, columns those that were written.

    Raises:
        ValueError: as `linear_attention`.
        TypeError: likewise.
    """
    check_tensors({"q": q, "k": k})
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(f"q must be (B, H, N, D) and k (B, G, N, D), got {tuple(q.shape)} and {tuple(k.shape)}")
    q, k = (at_least_float32(x) if x.is_floating_point() else x for x in (q, k))  # others are refused with the rest
    steps = torch.eye(q.shape[2], dtype=q.dtype, device=q.device).expand(*k.shape[:3], -1)
    with autocast_off(q.device.type):  # it would cast q and k
        out, _ = linear_attention(
            q,
            k,
            steps,
            log_decay=log_decay,
            beta=beta,
            normalise=normalise,
            scale=scale,
            reset=reset,
            impl="parallel",
        )
    return out


def _check(given: Inputs) -> None:
    """Refuse what does not fit together: what was expected, what was got."""
    q, k, v, log_decay, beta, normalise, causal, _, state, reset, chunk = given
    if q.ndim != 4 or q.shape[3] == 0:
        raise ValueError(f"q must be 4-dimensional (B, H, N, D) with D of 1 or more, got {tuple(q.shape)}")
    batch, heads, length, width = q.shape
    for name, x in (("k", k), ("v", v)):
        if x.ndim != 4 or x.shape[0] != batch or (causal and x.shape[2] != length):
            size = f"{length}" if causal else "M"
            raise ValueError(f"{name} must be ({batch}, G, {size}, D) for q {tuple(q.shape)}, got {tuple(x.shape)}")
    if k.shape[3] != width or v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"k must have the width of q, {width}, and v must be (B, G, M, Dv) with (B, G, M) as in k, got k "
            f"{tuple(k.shape)} and v {tuple(v.shape)}"
        )
    if k.shape[1] == 0 or heads % k.shape[1]:
        raise ValueError(f"the heads of k and v must divide those of q, {heads}, got {k.shape[1]}")
    if not causal and (log_decay is not None or beta is not None or reset is not None):
        raise ValueError("log_decay, beta and reset must be left out with causal=False: they have an order of steps")
    if beta is not None and normalise:
        raise ValueError("normalise must be False with beta: the delta rule's weights have no sum to divide by")
    if log_decay is not None:
        shapes = [(heads,), (batch, heads, length), (batch, heads, length, width)]
        if tuple(log_decay.shape) not in shapes:
            raise ValueError(
                f"log_decay must be (H,), (B, H, N) or (B, H, N, D) = {', '.join(map(str, shapes))}, got "
                f"{tuple(log_decay.shape)}"
            )
        if log_decay.ndim == 4 and beta is not None:
            raise ValueError(
                "log_decay must be (H,) or (B, H, N) with beta, got one for each channel: average it over the channels"
            )
    columns = v.shape[3] + normalise
    check_shapes(
        {
            "beta": (beta, (batch, heads, length), "(B, H, N)"),
            "state": (state, (batch, heads, width, columns), "(B, H, D, Dv + 1)" if normalise else "(B, H, D, Dv)"),
            "reset": (reset, (batch, length), "(B, N)"),
        }
    )
    check_chunk(chunk)
    check_kinds({"q": q, "k": k, "v": v}, {"log_decay": log_decay, "beta": beta, "state": state}, reset)


# --- engines, and what they refuse -----------------------------------------------------------------------------------


def _kernels():
    from nondual.ops.linear_attention import triton

    return triton


def _triton(given: Inputs) -> tuple[Tensor, Tensor]:
    return _kernels().linear_attention(*given)


def _too_wide(given: Inputs) -> str | None:
    width, columns = given.q.shape[3], given.v.shape[3]
    if max(width, columns) > WIDEST:
        return (
            f"D and Dv must be at most {WIDEST} for impl='triton', got {width} and {columns}; impl='chunked' takes any"
        )
    return None


def _each_channel(given: Inputs) -> str | None:
    if given.log_decay is not None and given.log_decay.ndim == 4:
        return "log_decay must be (H,) or (B, H, N) for impl='triton'; impl='chunked' takes one for each channel"
    return None


def _not_causal(given: Inputs) -> str | None:
    if not given.causal:
        return "causal must be True for impl='triton'; without it there are two products, which impl='chunked' makes"
    return None


def _transformed(given: Inputs) -> str | None:
    if why := refuses_transforms(*given.tensors()):
        return f"linear_attention(impl='triton') {why}; impl='chunked' and impl='auto' can do it"
    return None


ENGINES = {
    "triton": Engine(
        _triton,
        "our kernels",
        limits=(
            takes_dtypes("triton", "q", "chunked", *KERNEL_DTYPES),
            Limit(f"D and Dv up to {WIDEST}", _too_wide),
            Limit("no decay of each channel", _each_channel),
            Limit("causal", _not_causal),
            takes_chunks("triton", "chunked", *KERNEL_CHUNKS),
            needs_triton(_kernels),
            runs_kernels("q", _kernels),
            Limit("no forward-mode derivative, no transform of torch.func", _transformed, RuntimeError),
        ),
        auto=Preference("on a GPU", lambda given: given.q.device.type == "cuda"),
    ),
    "chunked": Engine(chunked.linear_attention, "by chunks in plain torch, in time and memory linear in N"),
    "parallel": Engine(
        parallel.linear_attention,
        "by its matrix in plain torch, in time and memory quadratic in N",
        auto=Preference("never", lambda _: False),
    ),
    "reference": Engine(
        reference.linear_attention,
        "step by step in plain torch",
        auto=Preference("never; `linear_attention_step` uses it", lambda _: False),
    ),
}
