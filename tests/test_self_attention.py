"""Self-attention against torch, and the claims of the chapter that bears its name."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linprog
from torch import nn

from nondual import training
from nondual.data import BANK
from nondual.efficient_attention.flash_attention import FlashAttention
from nondual.efficient_attention.mamba import Mamba
from nondual.ops import masks
from nondual.ops.attention import attention
from nondual.pretrained import minilm
from nondual.self_attention import KVCache, MultiHeadAttention, SelfAttention
from nondual.tasks import PAIRS, RING, relation
from nondual.transformer import FeedForward, TransformerLayer

B, N, M, E, HEADS = 2, 5, 7, 12, 4


@pytest.fixture(scope="module")
def encoder():
    return minilm()


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def torch_pair(**options):
    """nn.MultiheadAttention and ours, with its state loaded."""
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(E, HEADS, batch_first=True, dtype=torch.float64, **options)
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.5)
    d_memory = options.get("kdim")
    ours = MultiHeadAttention(E, HEADS, d_memory=d_memory, bias=options.get("bias", True)).double()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


# --- parity ----------------------------------------------------------------------------------------------


@pytest.mark.claim("A1.2", "holds")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["free", "causal", "padding"])
def test_q_k_v_from_one_x_equal_torch_forward_and_backward(bias, kind):
    """Ours with copied weights against nn.MultiheadAttention, and the written formula against both, in float64."""
    ours, theirs = torch_pair(bias=bias)
    allowed = {"free": None, "causal": masks.causal(N), "padding": masks.padding(torch.tensor([N, 3]), N)}[kind]
    per_head = None if allowed is None else allowed.expand(B, HEADS, N, N).flatten(0, 1)
    x, y = draw(B, N, E).requires_grad_(), draw(B, N, E).requires_grad_()
    out, weights = ours(x, mask=allowed, return_weights=True)
    expected, rows = theirs(
        y, y, y, attn_mask=None if allowed is None else ~per_head, average_attn_weights=False
    )  # their mask says where attending is forbidden
    torch.testing.assert_close((out, weights), (expected, rows))
    torch.testing.assert_close(ours(x, mask=allowed), expected)  # and without weights, by the fused engine

    q, k, v = (p(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in (ours.q_proj, ours.k_proj, ours.v_proj))
    scores = q @ k.mT / math.sqrt(E / HEADS)
    scores = scores if allowed is None else scores.masked_fill(~allowed, -math.inf)
    written = ours.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(-2))
    torch.testing.assert_close(written, expected)
    sdpa = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed).transpose(1, 2).flatten(-2)
    torch.testing.assert_close(ours.out_proj(sdpa), expected)

    out.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    stacked = torch.cat([p.weight.grad for p in (ours.q_proj, ours.k_proj, ours.v_proj)])
    torch.testing.assert_close(stacked, theirs.in_proj_weight.grad)
    torch.testing.assert_close(ours.out_proj.weight.grad, theirs.out_proj.weight.grad)


@pytest.mark.parametrize("d_memory", [E, 17])
def test_cross_attention_equals_torch(d_memory):
    ours, theirs = torch_pair(kdim=d_memory, vdim=d_memory)
    x, memory = draw(B, N, E), draw(B, M, d_memory, seed=1).requires_grad_()
    again = memory.detach().clone().requires_grad_()
    out, expected = ours(x, memory), theirs(x, again, again)[0]
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(memory.grad, again.grad)


def test_one_head_is_the_essays_formula():
    layer = SelfAttention(E, 3, 5).double()
    x = draw(B, N, E)
    q, k, v = x @ layer.q_proj.weight.T, x @ layer.k_proj.weight.T, x @ layer.v_proj.weight.T
    expected = torch.softmax(q @ k.mT / math.sqrt(3), -1)
    out, weights = layer(x, return_weights=True)
    torch.testing.assert_close((out, weights), (expected @ v, expected))
    torch.testing.assert_close(layer(x), out)
    torch.testing.assert_close(SelfAttention(E)(x.float(), causal=True).shape, x.shape)


def test_two_tokens_by_hand():
    """q = k = x: token 1 scores 1 with itself and 0 with token 2; e / (e + 1) = 0.731."""
    layer = SelfAttention(2)
    for p in layer.parameters():
        nn.init.eye_(p)
    x = 2**0.25 * torch.eye(2)[None]
    _, weights = layer(x, return_weights=True)
    torch.testing.assert_close(weights[0], torch.tensor([[0.7311, 0.2689], [0.2689, 0.7311]]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_grouped_heads_equal_full_heads_with_shared_weights(groups):
    grouped = MultiHeadAttention(E, HEADS, n_kv_heads=groups).double()
    full = MultiHeadAttention(E, HEADS).double()
    state = grouped.state_dict()
    for name in ("k_proj", "v_proj"):
        for kind in ("weight", "bias"):
            block = state[f"{name}.{kind}"].unflatten(0, (groups, -1))
            state[f"{name}.{kind}"] = block.repeat_interleave(HEADS // groups, 0).flatten(0, 1)
    full.load_state_dict(state)
    x = draw(B, N, E)
    torch.testing.assert_close(grouped(x, causal=True), full(x, causal=True))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("step", [1, 2, N])
def test_decoding_with_a_cache_equals_reading_at_once(groups, step):
    layer = MultiHeadAttention(E, HEADS, n_kv_heads=groups).double()
    x = draw(B, N, E)
    cache = KVCache(B, groups, N + 3, E // HEADS, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(2):
            parts = [layer(part, causal=True, cache=cache) for part in x.split(step, 1)]
            torch.testing.assert_close(torch.cat(parts, 1), layer(x, causal=True))
            assert cache.length == N
            cache.reset()


def test_another_op_drops_in():
    asked = {}

    def mean(q, k, v, **options):
        asked.update(options)
        return v.mean(2, keepdim=True).expand(*q.shape[:3], v.shape[-1])

    assert MultiHeadAttention(E, HEADS, op=mean)(torch.randn(B, N, E), causal=True).shape == (B, N, E)
    assert asked["causal"] is True


def test_dropout_is_for_training_only():
    layer = MultiHeadAttention(E, HEADS, dropout=0.5)
    x = torch.randn(B, N, E)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("n, m", [(0, 0), (0, 3), (3, 0)])
def test_zero_length(n, m):
    layer = MultiHeadAttention(E, HEADS)
    out = layer(torch.randn(B, n, E), torch.randn(B, m, E))
    assert out.shape == (B, n, E)
    torch.testing.assert_close(out, layer.out_proj.bias.expand(B, n, E))  # nothing found: what W_O adds by itself


def test_a_query_with_nothing_to_attend_is_not_nan_as_it_is_in_torch():
    ours, theirs = torch_pair()
    x, mask = draw(B, N, E), masks.causal(N)
    mask[2] = False
    assert theirs(x, x, x, attn_mask=~mask)[0][:, 2].isnan().all()
    torch.testing.assert_close(ours(x, mask=mask)[:, 2], ours.out_proj.bias.expand(B, E))


def test_compiles_whole():
    layer = MultiHeadAttention(E, HEADS, n_kv_heads=2)
    x = torch.randn(B, N, E)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, causal=True), layer(x, causal=True))


# --- a cache, whatever happens -----------------------------------------------------------------------------


def refused(layer, x, cache, cause):
    """Call the layer so that it raises, by this cause."""
    fail = KeyboardInterrupt if cause == "interrupted" else RuntimeError

    def stop(*_, **__):
        raise fail("stopped")

    asked = {}
    if cause == "mask shape":
        asked["mask"] = torch.ones(7, 7, dtype=torch.bool)
    elif cause == "mask dtype":
        asked["mask"] = torch.ones(x.shape[1], 9, dtype=torch.int32)
    elif cause == "mask is an array":
        asked["mask"] = torch.ones(x.shape[1], 9).numpy()
    elif cause in ("op", "interrupted"):
        layer = copy.deepcopy(layer)
        layer.op = stop
    elif cause == "forward hook of out_proj":
        layer = copy.deepcopy(layer)
        layer.out_proj.register_forward_hook(stop)
    elif cause == "dropout is not flash attention's":
        layer = copy.deepcopy(layer).train()
        layer.op, layer.dropout = FlashAttention(), 0.5
    elif cause == "dtype of the cache":
        x, layer = x.float(), copy.deepcopy(layer).float()
    elif cause == "beyond the capacity":
        x = torch.cat([x, x, x, x], 1)
    elif cause == "recording gradients":
        with torch.enable_grad():
            return layer(x, causal=True, cache=cache)
    return layer(x, causal=True, cache=cache, **asked)


CAUSES = [
    "mask shape", "mask dtype", "mask is an array", "op", "interrupted", "forward hook of out_proj",
    "dropout is not flash attention's", "dtype of the cache", "beyond the capacity", "recording gradients",
]  # fmt: skip


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("cause", CAUSES)
@torch.no_grad()
def test_a_call_that_raises_leaves_the_cache_as_it_was(cause, before, autocast):
    layer, x = MultiHeadAttention(E, HEADS).double().eval(), draw(B, N, E)
    cache = KVCache(B, HEADS, 9, E // HEADS, dtype=torch.float64)
    if before:
        layer(x[:, :before], causal=True, cache=cache)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with pytest.raises((ValueError, TypeError, RuntimeError, KeyboardInterrupt)):
            refused(layer, x[:, before : before + 3], cache, cause)
    assert cache.length == before
    rest = layer(x[:, before:], causal=True, cache=cache)
    torch.testing.assert_close(rest, layer(x, causal=True)[:, before:])


@pytest.mark.parametrize("kind", ["attention", "mamba"])
@pytest.mark.parametrize("norm_first", [False, True])
@torch.no_grad()
def test_a_layer_whose_feed_forward_raises_leaves_its_mixers_cache_as_it_was(kind, norm_first):
    def stop(*_):
        raise RuntimeError("stopped")

    mixer = MultiHeadAttention(E, HEADS) if kind == "attention" else Mamba(E)
    new = lambda: KVCache(B, HEADS, 9, E // HEADS) if kind == "attention" else mixer.new_cache(B)  # noqa: E731
    options = {"causal": True} if kind == "attention" else {}
    layer, x = TransformerLayer(mixer, FeedForward(E, 29), E, norm_first=norm_first), torch.randn(B, N, E)
    cache, fresh = new(), new()
    layer(x[:, :2], cache=cache, **options)
    expected = layer(x[:, :2], cache=fresh, **options), layer(x[:, 2:], cache=fresh, **options)
    hook = layer.feed_forward.register_forward_pre_hook(stop)
    with pytest.raises(RuntimeError, match="stopped"):
        layer(x[:, 2:], cache=cache, **options)
    hook.remove()
    torch.testing.assert_close(layer(x[:, 2:], cache=cache, **options), expected[1])


# --- autocast ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", [attention, FlashAttention()])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@torch.no_grad()
def test_a_default_cache_serves_under_autocast(op, dtype):
    layer, x = MultiHeadAttention(E, HEADS, n_kv_heads=2, op=op), torch.randn(B, N, E)
    cache = KVCache(B, 2, N, E // HEADS, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        whole = layer(x, causal=True)
        parts = [layer(part, causal=True, cache=cache) for part in x.split(2, 1)]
    assert cache.keys.dtype == (dtype or torch.float32) and cache.length == N
    assert whole.dtype == parts[0].dtype == torch.bfloat16
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-2, rtol=2e-2)


def test_a_cache_still_refuses_what_autocast_would_not_cast():
    layer = MultiHeadAttention(E, HEADS).double()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        with pytest.raises(ValueError, match=r"k must be torch.float32 on cpu for this cache, got torch.float64"):
            layer(draw(B, 1, E), cache=KVCache(B, HEADS, 4, E // HEADS))


@pytest.mark.parametrize("return_weights", [False, True])
@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.bfloat16, torch.bool])
def test_a_float32_mask_and_the_weights_under_autocast(return_weights, mask_dtype):
    torch.manual_seed(0)
    layer, x = MultiHeadAttention(E, HEADS), torch.randn(B, N, E)
    mask = masks.causal(N) if mask_dtype == torch.bool else torch.randn(N, N).to(mask_dtype)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x, mask=mask, return_weights=return_weights)
        q, k, v = (p(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    if not return_weights:
        out, _ = out, None
    else:
        out, weights = out
        exact = attention(q.double(), k.double(), v.double(), mask=mask if mask_dtype == torch.bool else mask.double(),
                          return_weights=True)[1]  # fmt: skip
        assert (weights - exact).abs().max() <= 2 * torch.finfo(torch.bfloat16).eps
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(
        out.float(), layer(x, mask=mask.float() if mask.is_floating_point() else mask), atol=3e-2, rtol=3e-2
    )


# --- transforms and compilation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("op", [attention, FlashAttention(), FlashAttention(window=3)])
@pytest.mark.parametrize("options", [{}, {"causal": True}])
def test_gradients_for_each_sample_and_forward_mode(op, options):
    """vmap(grad) over the module gives what a loop over samples gives; jvp is the gradient along the tangent."""
    layer, x = MultiHeadAttention(E, HEADS, n_kv_heads=2, op=op).double(), draw(3, N, E)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters, one):
        return torch.func.functional_call(layer, parameters, (one[None],), options).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(3):
        layer.zero_grad()
        layer(x[i : i + 1], **options).square().sum().backward()
        for name, p in layer.named_parameters():
            torch.testing.assert_close(each[name][i], p.grad)
    tangent = draw(3, N, E, seed=5)
    _, along = torch.func.jvp(lambda x: layer(x, **options).square().sum(), (x,), (tangent,))
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(layer(leaf, **options).square().sum(), leaf)
    torch.testing.assert_close(along, (gradient * tangent).sum())


@pytest.mark.parametrize("op", [attention, FlashAttention(), FlashAttention(window=3)])
def test_one_program_serves_many_lengths(op):
    torch._dynamo.reset()
    layer, programs = MultiHeadAttention(E, HEADS, n_kv_heads=2, op=op), []

    def backend(graph, inputs):
        programs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for n in (5, 9, 17, 33, 130):
        x = torch.randn(B, n, E)
        torch.testing.assert_close(compiled(x, causal=True), layer(x, causal=True))
    assert len(programs) <= 3


@pytest.mark.parametrize("op", [attention, FlashAttention(window=4)])
@torch.no_grad()
def test_decoding_with_a_cache_compiles_whole(op):
    """Prompt, then token by token: one program for all of the steps after the first few."""
    torch._dynamo.reset()
    layer, x, programs = MultiHeadAttention(E, HEADS, n_kv_heads=2, op=op), torch.randn(B, 16, E), []

    def backend(graph, inputs):
        programs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def read(part, cache):
        return layer(part, causal=True, cache=cache)

    compiled, cache = torch.compile(read, fullgraph=True, backend=backend), KVCache(B, 2, 16, E // HEADS)
    parts = [compiled(part, cache) for part in x.split([5, *[1] * 11], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), layer(x, causal=True))
    assert cache.length == 16
    assert len(programs) <= 5


def test_what_is_no_tensor_is_named():
    layer, x = MultiHeadAttention(E, HEADS), torch.randn(B, N, E)
    for call, name in (
        (lambda: layer(x.numpy()), "x"),
        (lambda: layer(x, x.numpy()), "memory"),
        (lambda: layer(x, mask=x.numpy()), "mask"),
        (lambda: SelfAttention(E)(x.tolist()), "x"),
        (lambda: KVCache(B, 2, 4, 3).append(torch.ones(B, 2, 1, 3).numpy(), torch.ones(B, 2, 1, 3)), "k"),
    ):
        with pytest.raises(TypeError, match=f"{name} must be a Tensor, got (ndarray|list); use torch."):
            call()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_parameters_and_cache(dtype):
    layer, x = MultiHeadAttention(E, HEADS).to(dtype), draw(B, N, E).to(dtype)
    cache = KVCache(B, HEADS, N, E // HEADS, dtype=dtype)
    parts = torch.cat([layer(part, causal=True, cache=cache) for part in x.split(2, 1)], 1)
    exact = copy.deepcopy(layer).double()(x.double(), causal=True)
    assert parts.dtype == dtype
    assert (parts - exact).abs().max() <= 8 * torch.finfo(dtype).eps * exact.abs().max()


cache = {"cache": KVCache(B, HEADS, 4, 3)}


@pytest.mark.parametrize(
    "call, error, says",
    [
        (lambda: MultiHeadAttention(E, 5), ValueError, "d_model must be a multiple of n_heads, got 12 and 5"),
        (lambda: MultiHeadAttention(E, 4, n_kv_heads=3), ValueError, "got 4 and 3"),
        (lambda: MultiHeadAttention(E, 0), ValueError, "1 or more, got 0"),
        (lambda: MultiHeadAttention(E, 4, dropout=1.5), ValueError, "dropout must be in"),
        (lambda: SelfAttention(E)(torch.zeros(N, E)), ValueError, r"x must be \(B, length, 12\), got \(5, 12\)"),
        (lambda: MultiHeadAttention(E, 4)(torch.zeros(B, N, 13)), ValueError, r"x must be \(B, length, 12\)"),
        (lambda: MultiHeadAttention(E, 4, d_memory=17)(torch.zeros(B, N, E)), ValueError, "memory must be given"),
        (
            lambda: MultiHeadAttention(E, 4)(torch.zeros(B, N, E), torch.zeros(B, M, 13)),
            ValueError,
            r"memory must be \(B, length, 12\)",
        ),
        (
            lambda: MultiHeadAttention(E, 4)(torch.zeros(B, N, E), torch.zeros(1, M, E)),
            ValueError,
            "q's batch B=2, got 1",
        ),
        (
            lambda: MultiHeadAttention(E, 4)(torch.zeros(B, N, E), torch.zeros(B, M, E), **cache),
            ValueError,
            "cannot go with memory",
        ),
        (
            lambda: MultiHeadAttention(E, 4)(torch.zeros(B, N, E), mask=torch.ones(B, N, dtype=torch.bool)),
            ValueError,
            r"mask\[:, None, None, :\]",
        ),
        (lambda: MultiHeadAttention(E, 4)(torch.zeros(B, N, E), **cache), ValueError, "cache holds 4 positions, and 5"),
        (lambda: MultiHeadAttention(E, 4)(torch.zeros(3, 1, E), **cache), ValueError, "for this cache"),
        (
            lambda: MultiHeadAttention(E, 4).double()(draw(B, 1, E), **cache),
            ValueError,
            "float32 on cpu for this cache",
        ),
        (lambda: MultiHeadAttention(E, 4)(torch.zeros(B, 1, E), **cache), RuntimeError, "under torch.no_grad"),
    ],
)
def test_bad_input_is_named(call, error, says):
    with pytest.raises(error, match=says):
        call()


# --- the chapter's claims --------------------------------------------------------------------------------


@pytest.mark.claim("A0.1", "holds if")
def test_every_position_is_related_to_every_other_unless_a_mask_forbids_it():
    """No N x N block of the Jacobian is zero; once causal, every block above the diagonal is, exactly.

    So once causal, of each pair the later still hears the earlier.
    """
    layer = MultiHeadAttention(E, HEADS).double()
    x = draw(1, N, E)

    def influence(**options):
        jacobian = torch.autograd.functional.jacobian(lambda x: layer(x, **options), x)[0, :, :, 0]
        return jacobian.abs().amax((1, 3))  # of output row i by input row j

    assert (influence() > 1e-6).all()
    hears = influence(causal=True) > 0
    assert torch.equal(hears, masks.causal(N))
    assert (hears | hears.T).all()


def in_hull(point, corners):
    """Whether a point is a weighted mean of the corners, decided by a linear programme that knows no weights."""
    equal = torch.cat([corners.T, torch.ones(1, len(corners), dtype=corners.dtype)])
    right = torch.cat([point, torch.ones(1, dtype=point.dtype)])
    return linprog([0.0] * len(corners), A_eq=equal.numpy(), b_eq=right.numpy(), bounds=(0, None)).status == 0


@pytest.mark.claim("A1.3", "holds if")
def test_what_is_found_was_in_the_sequence_but_not_how_to_find_it(encoder):
    """Each head's output lies in the hull of that sequence's values; which point of it, the learned weights decide."""
    layer = encoder.model.encoder.layers[0].mixer
    x = encoder.layers(["Nothing is fetched from outside the sentence."])[0][0]
    q, k, v = ((p(x).unflatten(-1, (12, 32)).transpose(1, 2)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    out, weights = layer.op(q, k, v, return_weights=True)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    for head in range(3):  # 11 values span a hull of 10 dimensions in 32: almost no point lies in it by chance
        corners = v[0, head].detach().double()
        # In float32 a row sums to 1 within 1e-7, and the linear program that looks for the hull is stricter.
        rows = weights[0, head].detach().double()
        rebuilt = rows / rows.sum(-1, keepdim=True) @ corners
        torch.testing.assert_close(rebuilt.float(), out[0, head].detach(), atol=1e-5, rtol=1e-4)
        assert all(in_hull(point, corners) for point in rebuilt)
        assert not any(in_hull(point + 0.01 * torch.randn_like(point), corners) for point in rebuilt)
    assert not in_hull(layer(x)[0, 2].detach().double(), x[0].double())  # after W_V and W_O it is no mean of X itself

    stranger = MultiHeadAttention(384, 12)  # the same sentence through weights that learned nothing
    _, other = stranger(x, return_weights=True)
    assert (weights - other).abs().amax() > 0.5


def antisymmetric_share(w_q, w_k):
    """How much of W_Q W_Kᵀ changes sign when asker and asked change places: 0 where symmetric, about ½ at random."""
    m = w_q.mT @ w_k
    return ((m - m.mT) / 2).square().sum((-2, -1)) / m.square().sum((-2, -1))


@pytest.mark.claim("A1.4", "holds if")
def test_one_source_stands_at_both_ends_of_a_score_and_the_roles_stay_apart(encoder):
    """Moving one token moves its row and its column of scores; in cross-attention, a row or a column.

    And the roles are not equal: no trained head is near symmetric. Were they equal, every score would be symmetric, and
    of any two tokens one would score itself no lower than the other.
    """
    torch.manual_seed(0)
    layer = SelfAttention(E).double()

    def scores(x, memory):
        return layer.q_proj(x) @ layer.k_proj(memory).mT

    x, other, moved = draw(N, E), draw(N, E, seed=1), draw(N, E)
    moved[2] += 1
    row, column = torch.zeros(N, N, dtype=torch.bool), torch.zeros(N, N, dtype=torch.bool)
    row[2], column[:, 2] = True, True
    for before, after, what_moves in (
        (scores(x, x), scores(moved, moved), row | column),
        (scores(x, other), scores(moved, other), row),
        (scores(other, x), scores(other, moved), column),
    ):
        assert torch.equal((before - after).abs() > 1e-9, what_moves)

    projections = [(layer.mixer.q_proj, layer.mixer.k_proj) for layer in encoder.model.encoder.layers]
    shares = torch.cat(
        [antisymmetric_share(*(p.weight.detach().view(12, 32, 384) for p in pair)) for pair in projections]
    )
    assert shares.shape == (72,)
    assert 0.12 < shares.min() < 0.14 and 0.60 < shares.max() < 0.62
    assert 0.4 < shares.median() < 0.5

    def oneself_first(scores):
        """For each pair, whether one of the two scores itself no lower than the other."""
        return scores <= torch.maximum(scores.diagonal()[:, None], scores.diagonal()) + 1e-12

    free = []
    for seed in range(20):
        x = draw(N, E, seed=seed)
        q, k = layer.q_proj(x), layer.k_proj(x)
        torch.testing.assert_close(q @ q.T, (q @ q.T).T)
        assert oneself_first(q @ q.T).all()
        free.append(oneself_first(q @ k.T).all())
    assert sum(free) < 10  # two projections: in most draws a token scores another above both own scores


def right_looks(scores):
    """The share of a ring of three that names the right card, where each names the card of the one it scores highest.

    scores (..., 3, 3). Whoever looks at one wrong one is right by luck, 1 in 8; at two or three alike, it names the
    commonest of their cards.
    """
    best = scores == scores.amax(-1, keepdim=True)
    mine = best.gather(-1, torch.tensor(RING).expand(*scores.shape[:-1])[..., None])[..., 0]
    alike = torch.tensor([0, 1, 1 / 8 + 7 / 8 / 2, 1 / 64 + 21 / 64 * 2 / 3 + 42 / 64 / 3])[best.sum(-1)]
    return torch.where(mine, alike, torch.tensor(1 / 8)).mean(-1)


@pytest.mark.claim("A1.4", "holds if")
def test_a_symmetric_score_gets_two_of_a_ring_of_three_and_no_more():
    """(2 + 1/8) / 3 = 0.708, reached where scores rise along the ring; by every order of six scores, ties included."""
    values = torch.cartesian_prod(*[torch.arange(6)] * 6)  # every order that six numbers can be in
    symmetric = values[:, torch.tensor([[0, 1, 2], [1, 3, 4], [2, 4, 5]])]
    most = (2 + 1 / 8) / 3
    assert right_looks(symmetric).max().item() == pytest.approx(most)

    rising = torch.tensor([[0.0, 1, 3], [1, 0, 2], [3, 2, 0]])  # s_01 < s_12 < s_20
    one_projection = torch.tensor([[0.0, 6], [1, 0], [2, 1]])  # q = k for each of the three
    directed = torch.tensor([[0.0, 1, -1], [-1, 0, 1], [1, -1, 0]])
    characters, cards, answers = relation(RING, 20_000, generator=torch.Generator().manual_seed(0))
    for scores, share in ((rising, most), (one_projection @ one_projection.T, most), (directed, 1.0)):
        assert right_looks(scores).item() == pytest.approx(share)
        weights = (50 * scores[characters[:, :, None], characters[:, None]]).softmax(-1)
        named = (weights @ F.one_hot(cards, 8).float()).argmax(-1)
        assert (named == answers).float().mean().item() == pytest.approx(share, abs=0.01)

    # What training prefers: to look at both others alike. Its loss is lower, though it names fewer cards.
    both_alike, two_of_three = 7 / 8 * math.log(2), math.log(8) / 3
    assert both_alike < two_of_three
    assert right_looks(1 - torch.eye(3)).item() == pytest.approx(0.5625)


class Halves(nn.Module):
    """The halves of q exchanged, the second times `sign`: q · k' = sign · k · q', and no parameters of its own."""

    def __init__(self, sign):
        super().__init__()
        self.sign = sign

    def forward(self, q):
        first, second = q.chunk(2, -1)
        return torch.cat([self.sign * second, first], -1)


TIES = {
    "free": None,
    "antisymmetric": lambda q: nn.Sequential(q, Halves(-1)),
    "symmetric": lambda q: nn.Sequential(q, Halves(1)),
    "one projection": lambda q: q,
}


def train(looks_at, tie, rate, seed, steps=200, width=32):
    """One attention layer learns who looks at whom; returns its accuracy in naming the card (chance 1/8)."""
    torch.manual_seed(seed)
    who, card = nn.Embedding(len(looks_at), width), nn.Embedding(8, width)
    layer, name = SelfAttention(width), nn.Linear(width, 8)
    if TIES[tie] is not None:
        layer.k_proj = TIES[tie](layer.q_proj)
    model = nn.ModuleList([who, card, layer, name])

    def answered(batch):
        characters, cards, answers = batch
        return name(layer(who(characters) + card(cards))).flatten(0, 1), answers.flatten()

    training.train(
        model,
        lambda batch: F.cross_entropy(*answered(batch)),
        lambda generator: relation(looks_at, 64, generator=generator),
        optimiser=torch.optim.Adam(model.parameters(), rate),
        steps=steps,
        schedule=training.constant,
        clip=None,
        seed=seed,
    )
    with torch.no_grad():
        logits, answers = answered(relation(looks_at, 4000))
        return (logits.argmax(-1) == answers).float().mean().item()


RATES, SEEDS = (1e-3, 3e-3, 1e-2), 3


@pytest.mark.claim("A1.4", "holds if")
@pytest.mark.timeout(900)  # it trains 42 layers
def test_a_trained_layer_needs_a_direction_for_the_ring_and_none_for_couples(one_thread):
    """Symmetric and antisymmetric scores, with as many parameters: the best of three rates for each, paired seeds."""

    def best(looks_at, tie):
        runs = torch.tensor([[train(looks_at, tie, rate, seed) for seed in range(SEEDS)] for rate in RATES])
        return runs[runs.mean(1).argmax()]

    gains = best(RING, "antisymmetric") - best(RING, "symmetric")
    half = 4.303 * gains.std() / math.sqrt(SEEDS)  # Student's t for 95 % and two degrees of freedom
    assert gains.mean() - half > 0.2
    assert all(train(RING, "free", 3e-3, seed) > 0.99 for seed in range(SEEDS))
    assert best(RING, "one projection").max() < 0.75

    assert all(train(PAIRS, "symmetric", 3e-3, seed) > 0.99 for seed in range(SEEDS))
    assert best(PAIRS, "antisymmetric").max() < 0.8


@pytest.mark.claim("A1.5", "holds if")
def test_q_seeks_k_is_found_v_flows(encoder):
    """Of one token in a trained layer, move the query, the key or the value alone, and see exactly what moves.

    Its query: its own row of weights, and no other. Its key: its own column of scores; so in every row its weight
    moves, and the others keep their proportions. Its value: no weight, and what each row receives by as much as its
    weight. But something flows without a match too: words give much of their weight to the two marker tokens.
    """
    sentences, to_marks, evenly = [s for sense in BANK.values() for s in sense], 0.0, 0.0
    for sentence in sentences:
        weights = encoder.attention(sentence)[1]  # (layers, H, N, N), [CLS] first and [SEP] last
        to_marks += weights[:, :, 1:-1, [0, -1]].sum(-1).mean((1, 2)) / len(sentences)
        evenly += 2 / weights.shape[-1] / len(sentences)
    assert len(sentences) == 48 and 0.315 < to_marks.min() and to_marks.max() < 0.625 and 0.16 < evenly < 0.17

    layer = encoder.model.encoder.layers[2].mixer
    x = encoder.layers(["The query seeks and the value flows."])[0][2].double()
    with torch.no_grad():
        q, k, v = (
            F.linear(x, p.weight.double(), p.bias.double()).unflatten(-1, (12, 32)).transpose(1, 2)
            for p in (layer.q_proj, layer.k_proj, layer.v_proj)
        )
    n, token = q.shape[2], 4
    others = torch.arange(n) != token

    def run(q=q, k=k, v=v):
        return q @ k.mT / math.sqrt(32), *attention(q, k, v, return_weights=True)

    def moved(x):
        x = x.clone()
        x[:, :, token] += draw(1, 12, 32, seed=7)
        return x

    scores, out, weights = run()

    _, out_q, weights_q = run(q=moved(q))
    assert ((weights_q - weights)[:, :, token].abs().amax(-1) > 1e-3).all()
    torch.testing.assert_close(weights_q[:, :, others], weights[:, :, others], rtol=0, atol=1e-14)
    torch.testing.assert_close(out_q[:, :, others], out[:, :, others], rtol=0, atol=1e-13)

    scores_k, _, weights_k = run(k=moved(k))
    assert ((scores_k - scores)[..., token].abs() > 1e-6).all()
    torch.testing.assert_close(scores_k[..., others], scores[..., others], rtol=0, atol=1e-13)
    assert ((weights_k - weights)[..., token].abs() > 1e-9).all()
    rest, rest_k = weights[..., others], weights_k[..., others]
    torch.testing.assert_close(rest_k / rest_k.sum(-1, keepdim=True), rest / rest.sum(-1, keepdim=True))

    _, out_v, weights_v = run(v=moved(v))
    assert torch.equal(weights_v, weights)
    flows = weights[..., token, None] * (moved(v) - v)[:, :, token, None]
    torch.testing.assert_close(out_v - out, flows, rtol=0, atol=1e-12)


# --- the real encoder ------------------------------------------------------------------------------------


def test_a_head_of_the_first_layer_looks_at_the_word_before(encoder):
    for sentence in ("The cat sat on the mat because it was warm.", *BANK["river"][:5]):
        _, weights = encoder.attention(sentence)
        assert weights[0, 2].diagonal(-1).min() > 0.9


def test_bank_parts_into_its_two_senses_as_the_layers_rise(encoder):
    """Over every pair of sentences: how often a pair of one sense is nearer than a pair of two. Half is chance."""
    sentences, sense = [*BANK["river"], *BANK["money"]], torch.arange(48) >= 24
    tokens = [encoder.tokens(s) for s in sentences]
    assert all(t.count("bank") == 1 for t in tokens)
    pair = torch.ones(48, 48, dtype=torch.bool).triu(1)
    same, cross = pair & (sense[:, None] == sense), pair & (sense[:, None] != sense)

    def compare(encoder):
        layers, _ = encoder.layers(sentences)
        bank = F.normalize(layers[:, torch.arange(48), [t.index("bank") for t in tokens]], dim=-1)
        near = bank @ bank.mT
        return near, [(layer[same][:, None] > layer[cross]).float().mean().item() for layer in near]

    near, told = compare(encoder)
    assert told[0] < 0.65 < 0.8 < max(told)
    assert (near[-1][cross] > near[-1][same].median()).any()  # single pairs mislead

    torch.manual_seed(0)
    untrained = minilm()  # the same embeddings under layers that learned nothing
    for module in untrained.model.encoder.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
    assert max(compare(untrained)[1]) < 0.65
