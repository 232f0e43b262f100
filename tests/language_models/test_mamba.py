"""The language model of Mamba blocks: its laws, its generation, and what it refuses."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from harness import DRAWS, ErrorBudget

from nondual.efficient_attention.mamba import Mamba
from nondual.efficient_attention.mamba2 import Mamba2
from nondual.language_models.mamba import MambaBlock, MambaLM, choose
from nondual.training import optimiser, train

B, N, E, V = 2, 11, 6, 13
MIXERS = {
    "mamba": partial(Mamba, d_state=5),
    "mamba2": partial(Mamba2, d_state=5, d_head=3, n_groups=2),
}


@pytest.fixture(params=MIXERS)
def model(request):
    torch.manual_seed(0)
    made = MambaLM(V, E, 3, mixer=MIXERS[request.param])
    with torch.no_grad():
        made.embeddings.weight *= 20  # from the small start, so that the next token is not a near tie
    return made.double()


def tokens(length=N, batch=B):
    return torch.randint(V, (batch, length), generator=torch.Generator().manual_seed(1))


def all_gradients(model, value):
    return dict(zip(dict(model.named_parameters()), torch.autograd.grad(value, list(model.parameters()))))


def assert_close(ours, theirs):
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], atol=1e-12, rtol=1e-12, msg=lambda m, n=name: n + m)


# --- what it computes ----------------------------------------------------------------------------------------------


def test_without_blocks_it_is_an_embedding_and_a_norm():
    model = MambaLM(2, 2, 0, eps=0.0)
    with torch.no_grad():
        model.embeddings.weight.copy_(torch.tensor([[3.0, 4.0], [1.0, 0.0]]))
    scores = model(torch.tensor([[0, 1]]))
    root = 12.5**0.5  # of the mean of 9 and 16
    torch.testing.assert_close(scores, torch.tensor([[[25 / root, 3 / root], [3 * 2**0.5, 2**0.5]]]))


def test_it_is_its_parts_in_order(model):
    ids = tokens()
    x = F.embedding(ids, model.embeddings.weight)
    for layer in model.layers:
        x = x + layer.mixer(F.rms_norm(x, (E,), layer.norm.weight, 1e-5))
    scores = F.rms_norm(x, (E,), model.norm_f.weight, 1e-5) @ model.embeddings.weight.T
    torch.testing.assert_close(model(ids), scores, atol=1e-12, rtol=1e-12)


def test_untied_scores_have_a_matrix_of_their_own():
    torch.manual_seed(0)
    model = MambaLM(V, E, 1, tied=False)
    assert model.lm_head.weight.shape == (V, E) and "lm_head.weight" in model.state_dict()
    model.lm_head.weight.data.zero_()
    assert not model(tokens()).any()
    assert "lm_head.weight" not in MambaLM(V, E, 1).state_dict()


def test_it_begins_small():
    torch.manual_seed(0)
    shallow, deep = MambaLM(V, 64, 1, mixer=partial(Mamba, bias=True)), MambaLM(V, 64, 16)
    torch.testing.assert_close(shallow.embeddings.weight.std(), torch.tensor(0.02), atol=2e-3, rtol=0)
    assert not shallow.layers[0].mixer.out_proj.bias.any()
    ratio = shallow.layers[0].mixer.out_proj.weight.std() / deep.layers[0].mixer.out_proj.weight.std()
    torch.testing.assert_close(ratio, torch.tensor(4.0), atol=0.2, rtol=0)


def test_the_residual_is_kept_wide():
    model = MambaLM(V, E, 2).bfloat16()
    seen = []
    model.layers[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    assert model(tokens()).dtype == torch.bfloat16
    model.residual_in_fp32 = False
    model(tokens())
    assert seen == [torch.float32, torch.bfloat16]


# --- laws ----------------------------------------------------------------------------------------------------------


def test_a_later_token_changes_nothing_before_it(model):
    ids = tokens()
    other = ids.clone()
    other[:, 7:] = (other[:, 7:] + 1) % V
    a, b = model(ids), model(other)
    assert torch.equal(a[:, :7], b[:, :7])
    assert not torch.isclose(a[:, 7:], b[:, 7:]).all(-1).any()


@torch.no_grad()
def test_a_prompt_and_then_token_by_token(model):
    ids, cache = tokens(), model.new_cache(B)
    parts = torch.cat([model(part, cache=cache) for part in ids.split([4, *[1] * (N - 4)], 1)], 1)
    torch.testing.assert_close(parts, model(ids), atol=1e-12, rtol=1e-12)


def test_packed_each_is_as_if_alone_and_so_are_the_gradients(model):
    ids, starts = tokens(), [0, 1, 6]
    reset = torch.zeros(B, N, dtype=torch.bool)
    reset[:, starts] = True
    spans = list(zip(starts, [*starts[1:], N]))
    alone = torch.cat([model(ids[:, a:b]) for a, b in spans], 1)
    packed = model(ids, reset=reset)
    torch.testing.assert_close(packed, alone, atol=1e-12, rtol=1e-12)
    g = torch.randn_like(packed)
    assert_close(all_gradients(model, (packed * g).sum()), all_gradients(model, (alone * g).sum()))


def test_the_loss_of_packed_sequences_is_that_of_each_alone(model):
    ids = tokens()
    reset = torch.zeros(B, N, dtype=torch.bool)
    reset[:, 6] = True
    each = [model.loss(ids[:, :6]), model.loss(ids[:, 6:])]
    torch.testing.assert_close(model.loss(ids, reset=reset), (5 * each[0] + 4 * each[1]) / 9, atol=1e-12, rtol=1e-12)
    plain = -model(ids)[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).mean()
    torch.testing.assert_close(model.loss(ids), plain, atol=1e-12, rtol=1e-12)


def test_it_learns_by_heart(model):
    ids, model = torch.arange(N)[None].expand(B, N), model.float()
    before = model.loss(ids).item()
    train(model, model.loss, lambda _: ids, optimiser=optimiser(model, 3e-2), steps=100)
    assert model.loss(ids).item() < before / 10
    assert torch.equal(model.generate(ids[:, :3], N - 3), ids)


def test_it_compiles_whole():
    torch.manual_seed(0)
    model = MambaLM(V, E, 1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens(5)), model(tokens(5)))


LARGER = {"mamba": Mamba, "mamba2": partial(Mamba2, d_state=16, d_head=16)}
ON_A_GPU = [pytest.param("cuda", dtype, marks=pytest.mark.gpu) for dtype in (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize("kind", MIXERS)
@pytest.mark.parametrize("device, dtype", [("cpu", torch.float32), *ON_A_GPU], ids=str)
def test_the_engine_does_not_matter(kind, device, dtype):
    """Scores no further off than 2 times what the plain engine is from float64, and every gradient than 3 times."""

    def run(impl, device, dtype, seed):
        torch.manual_seed(seed)
        model = MambaLM(61, 32, 2, mixer=partial(LARGER[kind], impl=impl)).to(device, dtype)
        ids = torch.randint(61, (B, 67), generator=torch.Generator().manual_seed(seed + 1)).to(device)
        scores = model(ids)
        found = {"scores": scores, **all_gradients(model, model.loss(ids))}
        return {name: value.detach().cpu() for name, value in found.items()}

    budget = ErrorBudget()
    for seed in range(DRAWS):
        exact = run("reference", "cpu", torch.float64, seed)
        plain, ours = run("reference", device, dtype, seed), run("auto", device, dtype, seed)
        for name, right in exact.items():
            budget.add(name, ours=ours[name], plain=plain[name], exact=right)
    budget.check({"scores": 2}, otherwise=3)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", MIXERS)
@torch.no_grad()
def test_on_a_gpu_it_goes_on_as_it_does_on_a_cpu(kind):
    torch.manual_seed(0)
    model = MambaLM(61, 32, 2, mixer=LARGER[kind])
    ids = torch.randint(61, (B, 67), generator=torch.Generator().manual_seed(1))
    scores, cache = model(ids), model.to("cuda").new_cache(B)
    parts = torch.cat([model(part.to("cuda"), cache=cache).cpu() for part in ids.split([64, 1, 1, 1], 1)], 1)
    torch.testing.assert_close(parts, scores, atol=1e-5, rtol=1e-4)
    assert model.generate(ids.to("cuda"), 5, temperature=1.0, top_k=9).shape == (B, 72)


def test_on_the_meta_device():
    with torch.device("meta"):
        scores = MambaLM(V, E, 2)(torch.empty(B, N, dtype=torch.long))
    assert scores.is_meta and scores.shape == (B, N, V)


def test_no_tokens_and_integers_of_any_width(model):
    assert model(tokens(0)).shape == (B, 0, V)
    assert torch.equal(model(tokens().int()), model(tokens()))
    assert model.generate(tokens().int(), 2).dtype == torch.int32
    assert model.loss(tokens().int()) == model.loss(tokens())


INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64]


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_ids_of_any_integer_dtype(model, dtype):
    ids = tokens().to(dtype)
    assert torch.equal(model(ids), model(tokens()))
    assert model.loss(ids) == model.loss(tokens())
    found = model.generate(ids, 3)
    assert found.dtype == dtype and torch.equal(found.long(), model.generate(tokens(), 3))
    wrong = torch.full((B, N), 13).to(dtype)
    with pytest.raises(ValueError, match="ids must lie in 0 to 12, got 13 to 13"):
        model(wrong)


def test_generated_tokens_that_the_dtype_of_the_prompt_does_not_hold():
    """A vocabulary of 300 does not fit in a byte: the answer comes in int64, with the same tokens."""
    torch.manual_seed(0)
    model, ids = MambaLM(300, E, 1), tokens()
    with torch.no_grad():
        model.embeddings.weight[:256] *= 0.1  # so that tokens above 255 are chosen
    right = model.generate(ids, 5)
    assert right[:, N:].max() > 255
    for dtype, expected in ((torch.uint8, torch.long), (torch.int8, torch.long), (torch.int16, torch.int16)):
        found = model.generate(ids.to(dtype), 5)
        assert found.dtype == expected and torch.equal(found.long(), right)


# --- a loss of nothing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch, everywhere", [(B, True), (0, False)])
def test_where_nothing_is_left_to_predict_the_loss_is_0_and_so_are_its_gradients(model, batch, everywhere):
    ids = tokens(batch=batch)
    loss = model.loss(ids, reset=torch.ones_like(ids, dtype=torch.bool) if everywhere else None)
    assert loss == 0
    assert not any(g.any() for g in torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True))
    few = torch.ones_like(tokens(), dtype=torch.bool)
    few[1, 4] = False  # one target is left
    expected = -model(tokens(), reset=few)[1, 3].log_softmax(-1)[tokens()[1, 4]]
    torch.testing.assert_close(model.loss(tokens(), reset=few), expected)


def test_the_loss_of_a_narrow_model_does_not_overflow():
    """20,000 tokens of some 10 nats each are more than float16 holds; their mean is not."""
    torch.manual_seed(0)
    model = MambaLM(V, E, 0, tied=False)
    with torch.no_grad():
        model.lm_head.weight *= 20
    ids = tokens(10_001)
    right, found = model.double().loss(ids), model.half().loss(ids)
    assert found.dtype == torch.float32 and right * 20_000 > 2**16
    torch.testing.assert_close(found.double(), right, atol=0, rtol=5e-3)


# --- generation ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_greedy_takes_the_likeliest_each_time(model):
    ids = tokens(4)
    for _ in range(6):
        ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(tokens(4), 6), ids)
    assert torch.equal(model.generate(tokens(4), 0), tokens(4))


@torch.no_grad()
def test_padded_on_the_left_it_goes_on_as_without(model):
    alone = [model.generate(tokens()[row : row + 1, start:], 5)[:, -5:] for row, start in ((0, 0), (1, 7))]
    padded, reset = tokens(), torch.zeros(B, N, dtype=torch.bool)
    padded[1, :7] = 0
    reset[1, 7] = True
    assert torch.equal(model.generate(padded, 5, reset=reset)[:, -5:], torch.cat(alone))


def test_after_its_last_token_a_row_repeats_it(model):
    long = model.generate(tokens(4), 9)
    eos = int(long[0, 5])
    short = model.generate(tokens(4), 9, eos=eos)
    first = (long[:, 4:] == eos).int().argmax(1) + 4
    first[~(long[:, 4:] == eos).any(1)] = 99
    for row in range(B):
        end = int(first[row]) + 1
        assert torch.equal(short[row, :end], long[row, : min(end, short.shape[1])])
        assert (short[row, end:] == eos).all()
    assert short.shape[1] == min(13, int(first.max()) + 1)


def test_draws_follow_the_scores():
    scores = torch.tensor([[0.0, 1.0, 2.0, -torch.inf]]).repeat(20_000, 1)
    for temperature, top_k, expected in (
        (1.0, None, scores[0].softmax(-1)),
        (2.0, None, (scores[0] / 2).softmax(-1)),
        (1.0, 2, torch.tensor([0.0, *torch.tensor([1.0, 2.0]).softmax(-1).tolist(), 0.0])),
        (1.0, 99, scores[0].softmax(-1)),
        (1e-3, None, torch.tensor([0.0, 0.0, 1.0, 0.0])),
    ):
        drawn = choose(scores, temperature, top_k, torch.Generator().manual_seed(0))
        shares = torch.bincount(drawn, minlength=4) / len(drawn)
        assert (shares - expected).abs().max() < 4 * (0.25 / len(drawn)) ** 0.5  # four deviations of a share
    assert choose(scores, None, None).unique().tolist() == [2]


def test_one_seed_one_text(model):
    texts = [
        model.generate(tokens(3), 8, temperature=1.5, top_k=7, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])
    assert texts[0].shape == (B, 11) and 0 <= texts[0].min() and texts[0].max() < V


# --- what it refuses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ids, says",
    [
        (torch.tensor([[0, 13]]), r"ids must lie in 0 to 12, got 0 to 13"),
        (torch.tensor([[-1, 3]]), r"ids must lie in 0 to 12, got -1 to 3"),
        (torch.zeros(N, dtype=torch.long), r"ids must be integers \(B, N\), got torch.int64 \(11,\)"),
        (torch.zeros(B, N), r"ids must be integers \(B, N\), got torch.float32 \(2, 11\)"),
    ],
)
def test_ids_that_are_none(model, ids, says):
    for call in (model, model.loss, lambda ids: model.generate(ids, 1)):
        with pytest.raises(ValueError, match=says):
            call(ids)


@pytest.mark.parametrize(
    "more, says",
    [
        (dict(temperature=0), r"temperature must be above 0, got 0; leave it out to take the likeliest"),
        (dict(temperature=-1.0), r"temperature must be above 0, got -1.0"),
        (dict(temperature=float("nan")), r"temperature must be above 0, got nan"),
        (dict(top_k=0, temperature=1.0), r"top_k must be 1 or more and go with a temperature, got 0 and 1.0"),
        (dict(top_k=3), r"top_k must be 1 or more and go with a temperature, got 3 and None"),
        (dict(n_new=-1), r"n_new must be 0 or more, got -1"),
        (dict(ids=tokens(0)), r"ids must hold a token or more to go on from, got \(2, 0\)"),
    ],
)
def test_generation_that_cannot_be(model, more, says):
    with pytest.raises(ValueError, match=says):
        model.generate(**(dict(ids=tokens(), n_new=3) | more))


@pytest.mark.parametrize("ids", [tokens().tolist(), tokens().numpy(), "text", None], ids=lambda x: type(x).__name__)
def test_ids_that_are_no_tensor(model, ids):
    for call in (model, model.loss, lambda ids: model.generate(ids, 1)):
        with pytest.raises(TypeError, match=f"ids must be a Tensor, got {type(ids).__name__}"):
            call(ids)


@pytest.mark.parametrize("reset", [torch.zeros(B, N), torch.zeros(B, N + 1, dtype=torch.bool), [[True] * N] * B])
def test_resets_that_do_not_fit(model, reset):
    for call in (model, model.loss, lambda ids, reset: model.generate(ids, 1, reset=reset)):
        with pytest.raises((ValueError, TypeError), match="reset must be"):
            call(tokens(), reset=reset)


def test_caches_and_lengths_that_do_not_fit(model):
    with pytest.raises(ValueError, match=r"cache must have one for each of 3 layers, got 2"):
        model(tokens(), cache=model.new_cache(B)[:2])
    with pytest.raises(ValueError, match=r"cache.conv must be .*; make one with new_cache\(2\)"):
        model(tokens(), cache=model.new_cache(3))
    with pytest.raises(ValueError, match=r"ids must have 2 tokens or more a row for a loss, got \(2, 1\)"):
        model.loss(tokens(1))
    with pytest.raises(ValueError, match=r"x must be \(B, N, 6\)"):
        MambaBlock(Mamba(E), 7)(torch.zeros(B, N, 7))
