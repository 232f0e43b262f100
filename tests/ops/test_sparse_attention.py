"""Block-sparse attention: the mask as lists of tiles, the door, and every engine against the definition."""

import copy
import dataclasses
import pickle

import pytest
import torch
from harness import check as check_errors
from harness import errors, incoming

from nondual.ops import masks
from nondual.ops.attention import attention, masked_softmax
from nondual.ops.flash_attention import flash_attention
from nondual.ops.sparse_attention import BlockMask, compiled, sparse_attention
from nondual.ops.sparse_attention.block_mask import TENSORS, WHOLE

ENGINES = ["reference", "tiles"]
WAYS = [*ENGINES, "tiles in torch"]  # "tiles" is a loop in C here, and plain torch where there is no compiler
SIZES = [(7, 7, 2), (5, 11, (2, 3)), (11, 5, (4, 2)), (1, 13, 4), (8, 8, 4), (3, 2, 16)]


def drawn(*shape, share=0.4, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < share


def made(n, m, d, dv=None, *, b=2, h=4, g=2, dtype=torch.float32, seed=0):
    draw = torch.Generator().manual_seed(seed)
    shapes = (b, h, n, d), (b, g, m, d), (b, g, m, dv or d)
    return [torch.randn(s, generator=draw).to(dtype).requires_grad_() for s in shapes]


@pytest.fixture
def impl(request, monkeypatch) -> str:
    """The engine's name; the environment says which way it takes."""
    name, _, way = request.param.partition(" in ")
    monkeypatch.setenv("NONDUAL_CPU_SPARSE", way)
    assert (compiled.library(torch.empty(0)) is None) == (way == "torch")
    return name


# --- the lists -------------------------------------------------------------------------------------------------------


BY_HAND = masks.causal(6)  # the picture at the head of block_mask.py
BY_HAND[4:, :2] = False


def test_the_lists_of_a_window_by_hand():
    mask = BlockMask.from_mask(BY_HAND, 2)
    assert mask.row_start.tolist() == [[[0, 1, 3, 5]]] and mask.columns.tolist() == [0, 0, 1, 1, 2]
    assert mask.row_kinds.tolist() == [0, WHOLE, 0, WHOLE, 0]
    assert mask.col_start.tolist() == [[[0, 2, 4, 5]]] and mask.rows.tolist() == [0, 1, 1, 2, 2]
    assert mask.col_kinds.tolist() == [0, WHOLE, 0, WHOLE, 0]
    assert mask.tile_masks.tolist() == [[[True, False], [True, True]]]
    assert (mask.kept_tiles, mask.tiles, mask.allowed_pairs) == (5, (3, 3), int(BY_HAND.sum()))
    assert mask.density == 20 / 36


@pytest.mark.parametrize("n, m, block", SIZES)
@pytest.mark.parametrize("lead", [(), (1, 3), (2, 3)])
def test_a_mask_comes_back_as_it_went_in(n, m, block, lead):
    for share in (0.0, 0.1, 0.9, 1.1):
        mask = drawn(*lead, n, m, share=share)
        kept = BlockMask.from_mask(mask, block)
        whole = mask if lead else mask[None, None]
        assert torch.equal(kept.mask(), whole)
        assert kept.allowed_pairs == int(whole.sum())
        for again in (pickle.loads(pickle.dumps(kept)), copy.deepcopy(kept), kept.to("cpu")):
            assert torch.equal(again.mask(), whole) and again.tiles == kept.tiles


@pytest.mark.parametrize("n, m, block", SIZES)
def test_a_predicate_gives_the_same_lists_as_its_mask(n, m, block):
    for window in (1, 3, 20):
        by_mask = BlockMask.from_mask(masks.sliding_window(n, m, window=window), block)
        for spans in (None, lambda first, last, w=window: [(first - w + 1, last + 1), (0, 1)]):
            given = BlockMask.from_predicate(n, m, lambda q, k, w=window: (k <= q) & (k > q - w), block, spans=spans)
            for name in TENSORS:
                assert torch.equal(getattr(given, name), getattr(by_mask, name)), name


@pytest.mark.parametrize("n, m, block", SIZES)
@pytest.mark.parametrize("causal", [False, True])
def test_chosen_blocks_are_whole_but_on_the_diagonal(n, m, block, causal):
    block_q, block_kv = block if isinstance(block, tuple) else (block, block)
    kept = drawn(2, 3, -(-n // block_q), -(-m // block_kv))
    mask = BlockMask.from_blocks(kept, block, n=n, m=m, causal=causal)
    dense = kept.repeat_interleave(block_q, 2)[:, :, :n].repeat_interleave(block_kv, 3)[..., :m]
    assert torch.equal(mask.mask(), dense & masks.causal(n, m) if causal else dense)
    assert mask.density <= dense.float().mean() + 1e-6
    assert len(mask.tile_masks) <= (block_q + block_kv if causal else 0)


def test_a_window_has_two_tile_masks_however_long_it_is():
    """And so the lists take memory in proportion to the kept tiles."""
    sizes = []
    for n in (512, 1024, 2048):
        mask = BlockMask.from_predicate(n, n, lambda q, k: (k <= q) & (k > q - 128), 64)
        assert len(mask.tile_masks) == 2 and mask.density < 3 * 64 / n
        sizes.append(sum(getattr(mask, name).numel() for name in TENSORS if name != "tile_masks"))
    assert sizes[2] - sizes[1] == 2 * (sizes[1] - sizes[0])


def test_the_predicate_is_asked_about_one_row_of_tiles_at_a_time():
    asked = []

    def predicate(q, k):
        asked.append((len(q), len(k)))
        return (k <= q) & (k > q - 100)

    BlockMask.from_predicate(1000, 1000, predicate, 64, spans=lambda first, last: [(first - 99, last + 1)])
    assert len(asked) == 16 and max(n * m for n, m in asked) <= 64 * 256


@pytest.mark.parametrize("field, value, says", [
    ("columns", [0, 0, 1, 1, 9], "lie in their 3 tiles"),
    ("columns", [0, 1, 0, 1, 2], "rise within"),
    ("row_kinds", [0, -1, 5, -1, 0], "one of 1 tile masks"),
    ("row_start", [[[0, 1, 3, 4]]], "rise from 0 to the number"),
    ("rows", [0, 2, 1, 2, 2], "same tiles"),
    ("col_kinds", [-1, -1, 0, -1, 0], "same tiles"),
    ("columns", [0, 0], r"row_kinds must be \(2,\)"),
])  # fmt: skip
def test_lists_that_do_not_fit_together_are_refused(field, value, says):
    mask = BlockMask.from_mask(BY_HAND, 2)
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(mask, **{field: torch.tensor(value, dtype=torch.int32)})


@pytest.mark.parametrize("make, says", [
    (lambda: BlockMask.from_mask(torch.ones(3, 3)), "mask must be torch.bool"),
    (lambda: BlockMask.from_mask(torch.ones(3, 3, 3).bool()), "or .Bm, Gm, N, M."),
    (lambda: BlockMask.from_mask(torch.ones(3, 3).bool(), 0), "block must be an integer of 1 or more"),
    (lambda: BlockMask.from_predicate(-1, 3, lambda q, k: k <= q), "n and m must be 0 or more"),
    (lambda: BlockMask.from_predicate(3, 3, lambda q, k: k - q), "predicate must give a boolean tensor"),
    (lambda: BlockMask.from_blocks(torch.ones(2, 2)), "kept must be torch.bool"),
    (lambda: BlockMask.from_blocks(torch.ones(2, 2).bool(), 4, n=9), "a row and a column for each tile"),
])  # fmt: skip
def test_what_a_mask_cannot_be_made_of(make, says):
    with pytest.raises(ValueError, match=says):
        make()


# --- the operation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", WAYS, indirect=True)
def test_two_queries_by_hand(impl):
    """Equal scores: the mean of the values that are allowed; nothing allowed: 0."""
    q, k = torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2)
    v = torch.tensor([[1.0], [2.0], [6.0]])[None, None]
    mask = BlockMask.from_mask(torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1]]).bool(), 2)
    out, lse = sparse_attention(q, k, v, mask, return_lse=True, impl=impl)
    torch.testing.assert_close(out[0, 0, :, 0], torch.tensor([1.5, 0, 3]))
    torch.testing.assert_close(lse[0, 0], torch.tensor([2, 0, 3]).log())


CASES = {
    "square": (50, 50, 8, 8, 16, (1, 1)),
    "fewer queries": (37, 53, 8, 12, (8, 16), (2, 2)),
    "more queries": (53, 37, 12, 5, 16, (2, 1)),
    "one query": (1, 71, 8, 8, 16, (1, 2)),
    "a tile larger than all": (7, 11, 3, 3, 64, (1, 1)),
}


def textbook(q, k, v, mask, scale):
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    mask = mask.repeat_interleave(q.shape[1] // mask.shape[1], dim=1)
    scores = (q @ k.mT * scale).masked_fill(~mask, -torch.inf)
    empty = ~mask.any(-1)
    lse = scores.masked_fill(empty[..., None], 0).logsumexp(-1)
    return masked_softmax(scores, mask) @ v, lse.masked_fill(empty.expand_as(lse), 0)


@pytest.mark.parametrize("impl", WAYS, indirect=True)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.usefixtures("poisoned")
def test_output_and_every_gradient_are_as_exact_as_plain_pytorch(impl, case, dtype):
    n, m, d, dv, block, lead = CASES[case]
    mask = BlockMask.from_mask(drawn(*lead, n, m, share=0.05), block)
    inputs, scale = made(n, m, d, dv, dtype=dtype), 0.7
    exact = [x.detach().double().requires_grad_() for x in inputs]

    def results(out, lse, of):
        lse = lse.masked_fill(lse == -torch.inf, 0)
        grads = torch.autograd.grad((out, lse), of, (incoming(out), incoming(lse, 2)))
        return {
            "out": out,
            "lse": lse.to(torch.float32 if dtype != torch.float64 else dtype),
            **dict(zip("qkv", grads)),
        }

    ours = sparse_attention(*inputs, mask, scale=scale, return_lse=True, impl=impl)
    assert ours[0].dtype == dtype and ours[1].dtype == torch.promote_types(dtype, torch.float32)
    found = errors(
        results(*ours, inputs),
        results(*textbook(*inputs, mask.mask(), scale), inputs),
        results(*textbook(*exact, mask.mask(), scale), exact),
    )
    check_errors(found, outputs={"out", "lse"})


@pytest.mark.parametrize("impl", WAYS, indirect=True)
def test_it_is_attention_with_a_mask_and_flash_attention_with_a_window(impl):
    q, k, v = made(100, 150, 8)
    window = masks.sliding_window(100, 150, window=33)
    out = sparse_attention(q, k, v, BlockMask.from_mask(window, 32), impl=impl)
    torch.testing.assert_close(out, attention(q, k, v, mask=window, impl="reference"), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out, flash_attention(q, k, v, window=33), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("impl", WAYS, indirect=True)
def test_two_halves_of_the_keys_join_by_their_log_sum_exp(impl):
    q, k, v = (x.detach() for x in made(40, 40, 8, dtype=torch.float64))
    left = drawn(40, 40, share=0.5)
    whole, lse = sparse_attention(q, k, v, BlockMask.from_mask(masks.causal(40), 16), return_lse=True, impl=impl)
    parts = [
        sparse_attention(q, k, v, BlockMask.from_mask(masks.causal(40) & part, 16), return_lse=True, impl=impl)
        for part in (left, ~left)
    ]
    joined = sum(out * (part - lse).exp()[..., None] for out, part in parts)
    torch.testing.assert_close(joined, whole)


@pytest.mark.parametrize("impl", WAYS[1:], indirect=True)
@pytest.mark.parametrize("scale", [0.0, -0.5, 40.0])
def test_any_scale(scale, impl):
    q, k, v = made(40, 40, 8)
    mask = BlockMask.from_mask(drawn(40, 40), 16)
    ours, plain = (sparse_attention(q, k, v, mask, scale=scale, impl=name) for name in (impl, "reference"))
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-4)


def test_auto_takes_the_tiles_and_under_torchs_transforms_the_definition(monkeypatch):
    from nondual.ops import sparse_attention as door

    q, k, v = (x.detach() for x in made(40, 40, 8))
    mask = BlockMask.from_mask(drawn(40, 40), 16)
    ran = []
    for name in ENGINES:
        engine = door.ENGINES[name]
        monkeypatch.setitem(
            door.ENGINES, name, engine._replace(run=lambda given, e=engine, n=name: (ran.append(n), e.run(given))[1])
        )
    sparse_attention(q, k, v, mask)
    assert ran == ["tiles"]

    def loss(x):
        return sparse_attention(x, k, v, mask).square().sum()

    exact = torch.autograd.functional.jacobian(lambda x: loss(x), q)
    assert ran[1:] == ["tiles"]
    torch.testing.assert_close(torch.func.grad(loss)(q), exact, atol=1e-5, rtol=1e-4)
    torch.func.jvp(loss, (q,), (torch.ones_like(q),))
    torch.func.vmap(lambda x: sparse_attention(x, k, v, mask))(torch.stack([q, q]))
    assert ran[2:] == ["reference"] * 3
    with pytest.raises(RuntimeError, match="impl='tiles' of sparse_attention cannot be transformed"):
        torch.func.grad(lambda x: sparse_attention(x, k, v, mask, impl="tiles").sum())(q)


def test_second_derivatives():
    """ "reference" has them; "tiles" says so."""
    q, k, v = (x.detach().double()[:1, :2, :5].requires_grad_() for x in made(5, 5, 3, g=2))
    mask = BlockMask.from_mask(masks.causal(5) & ~torch.eye(5, dtype=torch.bool)[0], 2)
    assert torch.autograd.gradgradcheck(lambda *x: sparse_attention(*x, mask, impl="reference"), (q, k, v))
    out = sparse_attention(q, k, v, mask, impl="tiles")
    (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative; impl='reference' has one"):
        dq.sum().backward()


@pytest.mark.parametrize("impl", WAYS, indirect=True)
def test_under_autocast_as_torchs_own(impl):
    q, k, v = (x.detach() for x in made(40, 40, 8))
    mask = BlockMask.from_mask(drawn(40, 40), 16)
    with torch.autocast("cpu", torch.bfloat16):
        out = sparse_attention(q, k, v, mask, impl=impl)
    assert out.dtype == torch.bfloat16
    given = (x.bfloat16() for x in (q, k, v))
    torch.testing.assert_close(out, sparse_attention(*given, mask, impl=impl))


@pytest.mark.parametrize("impl", WAYS, indirect=True)
def test_nothing_to_compute(impl):
    nothing = BlockMask.from_mask(torch.zeros(5, 7).bool(), 4)
    q, k, v = made(5, 7, 8)
    out, lse = sparse_attention(q, k, v, nothing, return_lse=True, impl=impl)
    assert not out.any() and (lse == -torch.inf).all()
    assert not any(grad.any() for grad in torch.autograd.grad(out.sum() + lse.masked_fill(lse < 0, 0).sum(), (q, k, v)))
    for n, m in ((0, 7), (5, 0), (0, 0)):
        q, k, v = made(n, m, 8)
        out = sparse_attention(q, k, v, BlockMask.from_mask(torch.ones(n, m).bool(), 4), impl=impl)
        assert out.shape == (2, 4, n, 8) and not out.any()


@pytest.mark.parametrize("change, says", [
    (lambda a: a | {"q": a["q"][0]}, "q must be 4-dimensional"),
    (lambda a: a | {"block_mask": BlockMask.from_mask(torch.ones(5, 5).bool())}, "M=7 keys, got one for 5 and 5"),
    (lambda a: a | {"block_mask": BlockMask.from_mask(torch.ones(3, 1, 5, 7).bool())}, "a batch of 1 or B=2"),
    (lambda a: a | {"block_mask": BlockMask.from_mask(torch.ones(1, 4, 5, 7).bool())}, "1 or G=2 key/value heads"),
    (lambda a: a | {"v": a["v"][..., :0]}, "v must have a width of 1 or more"),
    (lambda a: a | {"impl": "flash"}, "impl must be one of"),
    (lambda a: a | {"block_mask": BlockMask.from_mask(torch.ones(5, 7).bool()).to("meta")}, "q's device cpu, got"),
])  # fmt: skip
def test_the_door_refuses_what_does_not_fit(change, says):
    q, k, v = made(5, 7, 8)
    given = {"q": q, "k": k, "v": v, "block_mask": BlockMask.from_mask(torch.ones(5, 7).bool()), "impl": "auto"}
    given = change(given)
    options = {"impl": given.pop("impl")}
    with pytest.raises(ValueError, match=says):
        sparse_attention(*given.values(), **options)


def test_the_door_names_what_is_no_mask_and_no_tensor():
    q, k, v = made(5, 7, 8)
    with pytest.raises(TypeError, match="block_mask must be a BlockMask, got Tensor; "):
        sparse_attention(q, k, v, torch.ones(5, 7).bool())
    with pytest.raises(TypeError, match="q must be a Tensor, got list"):
        sparse_attention([1], k, v, BlockMask.from_mask(torch.ones(5, 7).bool()))
