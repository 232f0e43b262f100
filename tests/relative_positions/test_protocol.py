"""What all positions inside attention have in common: laws, caches, packed sequences, dtypes, compilation, refusals."""

import pytest
import torch
from position_cases import draw, fill
from torch import nn
from torch.export import Dim

from nondual.efficient_attention.flash_attention import FlashAttention
from nondual.ops import masks
from nondual.ops.attention import attention
from nondual.relative_positions import ALiBi, RelativeBias, RelativePositions, Rotary, of_layer
from nondual.relative_positions.protocol import check_start, distances
from nondual.self_attention import MultiHeadAttention

B, N, E, H, D = 2, 11, 12, 4, 6

KINDS = {
    "none": lambda: None,
    "base class": RelativePositions,
    "rotary": lambda: Rotary(D),
    "rotary, interleaved": lambda: Rotary(D, order="interleaved"),
    "rotary, partial": lambda: Rotary(D, n_turned=4),
    "rotary, yarn": lambda: Rotary(D, scaling="yarn", factor=4.0, trained_length=64),
    "alibi": lambda: ALiBi(H),
    "relative bias": lambda: RelativeBias(H, n_buckets=8, max_distance=16, causal=True),
    "relative bias, both ways": lambda: RelativeBias(H, n_buckets=8, max_distance=16),
}

COMPILED = ["rotary, partial", "alibi", "relative bias"]  # one of each file: compiling takes seconds


def layer(kind, **options):
    options = {"n_kv_heads": 2, "d_head": D, "causal": True} | options
    return fill(MultiHeadAttention(E, H, positions=KINDS[kind](), **options))


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.mark.parametrize("step", [1, 3, N])
@torch.no_grad()
def test_read_in_parts_with_a_cache_it_is_read_at_once(kind, step):
    made, x = layer(kind), draw(B, N, E)
    cache = made.new_cache(B, N)
    parts = [made(part, cache=cache) for part in x.split(step, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), made(x))


@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_a_packed_sequence_is_as_it_is_alone(kind, causal):
    """Only differences of places matter, so a sequence that begins at place 4 needs nothing more than its mask."""
    made, x = layer(kind, causal=causal), draw(B, N, E)
    reset = torch.zeros(B, N, dtype=torch.bool)
    reset[:, 4] = True
    alone = torch.cat([made(x[:, :4]), made(x[:, 4:])], 1)
    torch.testing.assert_close(made(x, reset=reset), alone)
    if causal:
        cache = made.new_cache(B, N)
        cuts = zip(x.split([2, 5, 4], 1), reset.split([2, 5, 4], 1))
        torch.testing.assert_close(torch.cat([made(a, cache=cache, reset=r) for a, r in cuts], 1), alone)


@torch.no_grad()
def test_a_batch_padded_on_the_left_is_as_without_padding(kind):
    made, x = layer(kind), draw(B, N, E)
    reset = torch.zeros(B, N, dtype=torch.bool)
    reset[0, 0] = reset[1, 5] = True
    torch.testing.assert_close(made(x, reset=reset)[1:, 5:], made(x[1:, 5:]))


@pytest.mark.parametrize("mask", ["boolean", "floating", "of a batch", "nothing allowed"])
def test_a_mask_and_the_bias_together(kind, mask):
    """As with plain attention, the bias written out beside it."""
    made, x = layer(kind, causal=False), draw(B, N, E)
    given = {
        "boolean": masks.causal(N),
        "floating": draw(N, N, seed=1),
        "of a batch": masks.padding(torch.tensor([N, 4]), N),
        "nothing allowed": torch.zeros(N, N, dtype=torch.bool),
    }[mask]
    out, weights = made(x, mask=given, return_weights=True)
    heads = {n: getattr(made, f"{n}_proj")(x).unflatten(-1, (-1, D)).transpose(1, 2) for n in "qkv"}
    positions = made.positions or RelativePositions()
    q, k = positions.turn(heads["q"]), positions.turn(heads["k"])
    scores = q @ k.repeat_interleave(2, 1).mT / D**0.5
    bias = positions.bias(N, N, dtype=torch.float64)
    scores = scores if bias is None else scores + bias
    scores = scores.masked_fill(~given, -torch.inf) if given.dtype == torch.bool else scores + given
    expected = scores.softmax(-1).nan_to_num(0)
    torch.testing.assert_close(weights, expected)
    joined = (expected @ heads["v"].repeat_interleave(2, 1)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(out, made.out_proj(joined))
    torch.testing.assert_close(made(x, mask=given), out)


def test_rotary_runs_on_flash_attention_and_a_bias_goes_to_the_other_op(kind):
    x, called = draw(B, N, E), []

    def otherwise(*args, **options):
        called.append(options["mask"])
        return attention(*args, **options)

    plain, flash = layer(kind), layer(kind, op=FlashAttention(otherwise=otherwise))
    torch.testing.assert_close(flash(x), plain(x))
    has_bias = "alibi" in kind or "bias" in kind
    assert len(called) == has_bias and all(mask.shape == (1, H, N, N) for mask in called)
    if has_bias:
        with pytest.raises(ValueError, match="mask must be None for flash attention"):
            layer(kind, op=FlashAttention())(x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_stays_near_float64(kind, dtype):
    made, x = layer(kind), draw(B, N, E) / 4
    exact, cache = made(x), None
    made.to(dtype)
    cache = made.new_cache(B, N)
    parts = torch.cat([made(part.to(dtype), cache=cache) for part in x.split(4, 1)], 1)
    for out in (made(x.to(dtype)), parts):
        assert out.dtype == dtype
        assert (out - exact).abs().max() / exact.abs().max() < 16 * torch.finfo(dtype).eps


@torch.no_grad()
def test_under_autocast(kind):
    made, x = layer(kind), draw(B, N, E) / 4
    exact = made(x)
    made.float()
    with torch.autocast("cpu", torch.bfloat16):
        out = made(x.float())
        cache = made.new_cache(B, N)
        parts = torch.cat([made(part.float(), cache=cache) for part in x.split(4, 1)], 1)
    for got in (out, parts):
        assert (got - exact).abs().max() / exact.abs().max() < 16 * torch.finfo(torch.bfloat16).eps


def test_gradients_are_those_of_finite_differences(kind):
    made, x = layer(kind), draw(1, 5, E).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: made(x), x)
    if list(getattr(made.positions, "parameters", list)()):
        table = made.positions.table.weight
        loss = made(x).square().sum()
        (grad,) = torch.autograd.grad(loss, table)
        with torch.no_grad():
            table[1, 2] += 1e-6
        torch.testing.assert_close((made(x).square().sum() - loss) / 1e-6, grad[1, 2], rtol=1e-4, atol=1e-6)


def test_a_state_is_written_and_read(kind):
    made, other, x = (
        layer(kind),
        MultiHeadAttention(E, H, n_kv_heads=2, d_head=D, positions=KINDS[kind]()),
        draw(B, N, E),
    )
    other.double().load_state_dict(made.state_dict())
    assert torch.equal(other(x, causal=True), made(x))
    learned = {name for name in made.state_dict() if "proj" not in name}
    assert learned == ({"positions.table.weight"} if "bias" in kind else set())


@pytest.mark.parametrize("n", [0, 1])
def test_few_positions(kind, n):
    assert layer(kind)(draw(B, n, E)).shape == (B, n, E)


@pytest.mark.parametrize("kind", COMPILED)
@torch.no_grad()
def test_it_compiles_whole_for_many_lengths(kind):
    torch._dynamo.reset()
    made, x = layer(kind), draw(B, N, E)
    compiled = torch.compile(made, fullgraph=True, backend="eager", dynamic=True)
    for n in (5, 7, N):
        torch.testing.assert_close(compiled(x[:, :n]), made(x[:, :n]))
    cache = made.new_cache(B, N)
    parts = [compiled(part, cache=cache) for part in x.split([4, 1, 1, 5], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), made(x))


@pytest.mark.parametrize("kind", COMPILED)
@pytest.mark.parametrize("strict", [False, True])
@torch.no_grad()
def test_one_exported_program_serves_every_length(kind, strict):
    made = layer(kind)
    shapes = ({1: Dim("n", min=2, max=255)},)
    program = torch.export.export(made, (draw(B, 5, E),), dynamic_shapes=shapes, strict=strict).module()
    for n in (2, 3, 150):
        x = draw(B, n, E)
        torch.testing.assert_close(program(x), made(x))


def test_the_distances_of_the_last_queries():
    assert distances(2, 3).tolist() == [[-1, 0, 1], [-2, -1, 0]]
    assert distances(0, 3).shape == (0, 3)


def test_a_layer_has_its_own_positions_or_shares_them():
    shared = Rotary(D)
    assert of_layer(shared, 3) is shared and of_layer(None, 3) is None
    assert of_layer(lambda i: Rotary(2 * i), 3) == Rotary(6)
    table = RelativeBias(H)
    assert of_layer(table, 3) is table


@pytest.mark.parametrize(
    "call, error, says",
    [
        (lambda: distances(4, 3), ValueError, "n must lie in 0 to m=3, since the queries are the last n of m places"),
        (lambda: check_start(-1), ValueError, "start must be 0 or more, got -1"),
        (lambda: MultiHeadAttention(E, H, positions=ALiBi(3)), ValueError, r"positions must be ALiBi\(4\), one slope"),
        (lambda: MultiHeadAttention(E, H, positions=RelativeBias(3)), ValueError, r"must be a RelativeBias\(4\)"),
        (lambda: MultiHeadAttention(E, H, positions=Rotary(4)), ValueError, r"must be Rotary\(3\), of the head width"),
        (lambda: MultiHeadAttention(E, H, positions=nn.Embedding(3, E)), TypeError, "must be Rotary, .* got Embedding"),
        (lambda: MultiHeadAttention(E, H, positions=Rotary), TypeError, "RelativePositions, got Rotary"),
        (
            lambda: MultiHeadAttention(E, H, d_memory=7, positions=ALiBi(H)),
            ValueError,
            "positions must be None for a m",
        ),
        (lambda: layer("alibi")(draw(B, N, E), draw(B, 3, E)), ValueError, "memory must be None for a module with pos"),
        (
            lambda: layer("alibi")(draw(B, N, E), mask=masks.causal(3)),
            ValueError,
            r"mask must be .* \(N, M\) = \(11, 1",
        ),
        (lambda: layer("alibi")(draw(B, N, E), mask=torch.ones(N, N).int()), ValueError, "mask must be .*torch.int32"),
        (lambda: layer("rotary")(draw(3, 1, E), cache=layer("rotary").new_cache(B, N)), ValueError, "for this cache"),
    ],
)
@torch.no_grad()
def test_bad_input_is_named(call, error, says):
    with pytest.raises(error, match=says):
        call()
