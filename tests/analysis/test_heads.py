"""Heads measured: against formulas written out, transformers' own attention, and maps made by hand."""

import copy
import doctest
import math

import pytest
import torch
from analysis_cases import IDS, SENTENCE, B, D, E, H, N, V, draw, layer, watched
from torch import nn

import nondual.analysis
from nondual import GPT, Encoder, FlashAttention, MultiHeadAttention, TextEncoder
from nondual.analysis import (
    all_heads,
    attention_layers,
    head_contributions,
    ov_circuit,
    overlap,
    profile,
    qk_circuit,
    record_heads,
    replace_heads,
    weights_of,
)
from nondual.ops import masks
from nondual.ops.attention import attention
from nondual.pretrained.encoder import from_bert

# --- many heads (A2.1) -----------------------------------------------------------------------------------------------


@pytest.mark.claim("A2.1", "holds")
@pytest.mark.parametrize("n_heads", [1, 2, 3, 4, 6, 12])
def test_heads_side_by_side_times_w_o_are_the_sum_of_each_heads_projection(n_heads):
    """The batched product against a loop over heads, each with matrices of its own; and torch's own layer."""
    module, x = layer(n_heads), draw(B, N, E)
    d_k = E // n_heads
    assert module.d_head == d_k
    assert sum(p.numel() for p in module.parameters()) == 4 * E * E + 4 * E  # whatever the number of heads
    with record_heads(module) as record:
        out, weights = module(x, return_weights=True)

    heads, maps = [], []
    for i in range(n_heads):
        own = slice(i * d_k, (i + 1) * d_k)
        q, k, v = (
            x @ p.weight[own].T + p.bias[own]  # E -> d_k
            for p in (module.q_proj, module.k_proj, module.v_proj)
        )
        maps.append(torch.softmax(q @ k.mT / math.sqrt(d_k), -1))
        heads.append(maps[-1] @ v)
    w_o, bias = module.out_proj.weight.T, module.out_proj.bias
    joined = torch.cat(heads, -1) @ w_o + bias
    summed = sum(head @ w_o[i * d_k : (i + 1) * d_k] for i, head in enumerate(heads)) + bias
    torch.testing.assert_close(out, joined)
    torch.testing.assert_close(out, summed)
    torch.testing.assert_close(weights, torch.stack(maps, 1))
    torch.testing.assert_close(record.outputs[0], torch.stack(heads, 2).detach())
    contributions = head_contributions(module, record.outputs[0])
    assert contributions.shape == (B, N, n_heads, E)
    torch.testing.assert_close(contributions.sum(2) + bias, out)

    theirs = nn.MultiheadAttention(E, n_heads, batch_first=True, dtype=torch.float64)
    state = {"in_proj_weight": torch.cat([p.weight for p in (module.q_proj, module.k_proj, module.v_proj)])}
    state["in_proj_bias"] = torch.cat([p.bias for p in (module.q_proj, module.k_proj, module.v_proj)])
    theirs.load_state_dict(state | {"out_proj.weight": module.out_proj.weight, "out_proj.bias": bias})
    torch.testing.assert_close((out, weights), theirs(x, x, x, average_attn_weights=False))


@pytest.mark.claim("A2.1", "holds")
def test_no_heads_queries_keys_or_values_change_the_weights_of_another():
    module, x = layer(), draw(B, N, E)
    _, before = module(x, return_weights=True)
    for name in ("q_proj", "k_proj", "v_proj"):
        for head in range(H):
            changed = copy.deepcopy(module)
            with torch.no_grad():
                getattr(changed, name).weight[head * D : (head + 1) * D] += 1 + draw(D, E, seed=1)
            _, after = changed(x, return_weights=True)
            others = [i for i in range(H) if i != head]
            assert torch.equal(after[:, others], before[:, others])
            assert torch.equal(after[:, head], before[:, head]) == (name == "v_proj")


@pytest.mark.claim("A2.1", "holds")
def test_the_sum_over_heads_is_the_layers_output_in_a_trained_model(encoder):
    ids = torch.tensor([encoder.tokenizer.encode(SENTENCE).ids])
    layers = attention_layers(encoder.model)
    with torch.no_grad(), record_heads(encoder.model) as record, watched(found.output for found in layers) as seen:
        encoder.model(ids)
    assert len(seen) == len(layers) == 6
    for found, output, (_, out) in zip(layers, record.outputs, seen):
        assert (found.n_heads, found.d_head) == (12, 384 // 12)
        summed = head_contributions(found, output).sum(2) + found.output.bias
        torch.testing.assert_close(summed, out, rtol=1e-4, atol=1e-5)


# --- interfaces (D3) -------------------------------------------------------------------------------------------------


def rebased(module: MultiHeadAttention) -> MultiHeadAttention:
    """A copy whose every head has (W_Q M, W_K M⁻ᵀ) and (W_V L, L⁻¹ W_O) for random M and L; biases go along."""
    changed = copy.deepcopy(module)
    q, k, v, o = (p.weight.detach() for p in (changed.q_proj, changed.k_proj, changed.v_proj, changed.out_proj))
    for head in range(module.n_heads):
        own = slice(head * D, (head + 1) * D)
        m, ell = draw(D, D, seed=head), draw(D, D, seed=head + 50)
        q[own], k[own] = m.T @ q[own], m.inverse() @ k[own]  # weights are (out, in): x W_Q M is F.linear with Mᵀ W
        v[own], o[:, own] = ell.T @ v[own], o[:, own] @ ell.T.inverse()
        for p, turn in ((changed.q_proj, m.T), (changed.k_proj, m.inverse()), (changed.v_proj, ell.T)):
            p.bias.data[own] = turn @ p.bias.data[own]
    return changed


@pytest.mark.claim("D3", "holds")
def test_any_basis_of_queries_keys_and_values_gives_the_same_function():
    """Every number in q, k and v is another one, and no weight, no output and no circuit is."""
    module, x = layer(), draw(B, N, E)
    changed = rebased(module)
    for name in ("q_proj", "k_proj", "v_proj"):
        difference = getattr(changed, name)(x) - getattr(module, name)(x)
        assert difference.abs().min() > 1e-6 and difference.abs().mean() > 0.5
    for allowed in (None, masks.causal(N)):
        torch.testing.assert_close(
            changed(x, mask=allowed, return_weights=True),
            module(x, mask=allowed, return_weights=True),
            rtol=1e-9,
            atol=1e-9,
        )
    for head in range(H):
        torch.testing.assert_close(qk_circuit(changed, head), qk_circuit(module, head), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(ov_circuit(changed, head), ov_circuit(module, head), rtol=1e-9, atol=1e-9)
    only_queries = copy.deepcopy(module)
    only_queries.q_proj.load_state_dict(changed.q_proj.state_dict())
    assert not torch.allclose(only_queries(x), module(x))  # one side alone must not move


@pytest.mark.claim("D3", "holds")
def test_in_a_trained_model_the_basis_of_queries_and_keys_is_free_too(encoder):
    """MiniLM with every head's queries and keys in another, random orthogonal basis gives the same vectors."""
    changed = copy.deepcopy(encoder.model)
    generator = torch.Generator().manual_seed(0)
    for found in attention_layers(changed):
        width = found.d_head
        for head in range(found.n_heads):
            own = slice(head * width, (head + 1) * width)
            turn = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
            for p in (found.query, found.key):
                p.weight.data[own], p.bias.data[own] = turn @ p.weight.data[own], turn @ p.bias.data[own]
    ids = torch.tensor([encoder.tokenizer.encode(SENTENCE).ids])
    with torch.no_grad():
        torch.testing.assert_close(changed(ids), encoder.model(ids), rtol=1e-3, atol=1e-4)
    moved = changed.encoder.layers[0].mixer.q_proj.weight - encoder.model.encoder.layers[0].mixer.q_proj.weight
    assert moved.norm() > encoder.model.encoder.layers[0].mixer.q_proj.weight.norm()


@pytest.mark.claim("D3", "holds")
def test_with_rotary_positions_fewer_bases_are_free(llama):
    """A turn of the pairs that the positions turn, and a factor, leave the function as it was; another basis does not.

    Where keys are shared by a group of queries, the whole group goes by one M.
    """
    width, half = 6, 3
    angle = torch.tensor([0.4, 1.3, 2.2])
    turn = torch.zeros(width, width)  # by its own angle in each plane (d, d + half)
    for d in range(half):
        turn[d, d] = turn[d + half, d + half] = angle[d].cos()
        turn[d, d + half], turn[d + half, d] = -angle[d].sin(), angle[d].sin()
    any_turn = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(0))).Q
    with torch.no_grad():
        before = llama(IDS).logits
    for basis, same in ((turn, True), (2 * torch.eye(width), True), (any_turn, False)):
        changed = copy.deepcopy(llama)
        for found in attention_layers(changed):
            q = found.query.weight.data.view(found.n_heads, width, -1)
            k = found.key.weight.data.view(found.n_kv_heads, width, -1)
            q.copy_(basis @ q)
            k.copy_(basis.inverse().T @ k)
        with torch.no_grad():
            assert torch.allclose(changed(IDS).logits, before, rtol=1e-3, atol=1e-3) == same


# --- what passes between heads (D6) ----------------------------------------------------------------------------------


@pytest.mark.claim("D6", "holds if")
def test_within_a_layer_no_head_depends_on_another_until_w_o_adds_them():
    """∂ head_b / ∂ (q, k, v of head_a) is zero for a ≠ b and not for a = b; every head moves the layer's output."""
    seen = []

    def kept(q, k, v, **options):
        seen[:] = [x.detach().requires_grad_() for x in (q, k, v)]
        return attention(*seen, **options)

    module, x = layer(op=kept), draw(B, N, E)
    with record_heads(module, gradients=True) as record:
        out = module(x)
    for b in range(H):
        reaches = torch.autograd.grad(record.outputs[0][:, :, b].square().sum(), seen, retain_graph=True)
        for gradient in reaches:  # (B, H, N, D)
            assert [bool(gradient[:, a].any()) for a in range(H)] == [a == b for a in range(H)]
    for channel in range(E):
        (gradient,) = torch.autograd.grad(out[..., channel].sum(), record.outputs[0], retain_graph=True)
        assert (gradient != 0).any(-1).all()  # every head, at every position


@pytest.mark.claim("D6", "holds if")
def test_a_head_switched_off_changes_no_other_of_its_layer_and_all_of_the_next():
    torch.manual_seed(0)
    model, x = Encoder(E, H, 24, 2).double(), draw(B, N, E)
    with torch.no_grad(), record_heads(model) as usual:
        model(x)
    maps = weights_of(model, x)
    for a in range(H):
        with torch.no_grad(), replace_heads(model, {(0, a): 0.0}), record_heads(model) as record:
            model(x)
        with replace_heads(model, {(0, a): 0.0}):
            changed = weights_of(model, x)
        others = [b for b in range(H) if b != a]
        assert torch.equal(record.outputs[0][:, :, others], usual.outputs[0][:, :, others])
        assert torch.equal(changed[0], maps[0])
        for b in range(H):
            assert (record.outputs[1][:, :, b] - usual.outputs[1][:, :, b]).abs().max() > 1e-4
            assert (changed[1, :, b] - maps[1, :, b]).abs().max() > 1e-5  # where it looks, too


@pytest.mark.claim("D6", "holds if")
def test_in_a_trained_model_the_next_layers_heads_look_elsewhere_without_one_head(encoder):
    """Without head 2 of MiniLM's layer 0, which looks at the word before: nothing changes beside it, all above it."""
    ids = torch.tensor([encoder.tokenizer.encode(SENTENCE).ids])
    usual = weights_of(encoder.model, ids)
    with replace_heads(encoder.model, {(0, 2): 0.0}):
        without = weights_of(encoder.model, ids)
    moved = (without - usual).abs().sum(-1).amax((1, 3)) / 2  # (layers, H), the share of a query's weight that moved
    assert torch.equal(without[0], usual[0])
    assert moved[1].min() > 0.01 and moved[1].max() > 0.1


@pytest.mark.claim("D6", "holds if")
def test_in_training_what_one_head_learns_depends_on_the_others():
    """The loss ties heads that do not read one another: without head 0, head 1 gets another gradient."""
    module, x, target = layer(), draw(B, N, E), draw(B, N, E, seed=1)

    def gradient() -> torch.Tensor:
        (found,) = torch.autograd.grad((module(x) - target).square().mean(), module.v_proj.weight)
        return found[D : 2 * D]

    usual = gradient()
    with replace_heads(module, {(0, 0): 0.0}):
        assert (gradient() - usual).norm() > 0.05 * usual.norm()


def test_contributions_sum_to_the_output_in_models_of_transformers(llama, bert):
    for model in (llama, bert):
        layers = attention_layers(model)
        with torch.no_grad(), record_heads(model) as record, watched(found.output for found in layers) as seen:
            model(IDS)
        for found, output, (_, out) in zip(layers, record.outputs, seen):
            summed = head_contributions(found, output).sum(2)
            summed = summed if found.output.bias is None else summed + found.output.bias
            torch.testing.assert_close(summed, out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(B, N, H, D + 1), (B, N, E)])
def test_outputs_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"outputs must be \(B, N, 4, 3\), got"):
        head_contributions(layer(), torch.zeros(shape))


# --- weights of a run ------------------------------------------------------------------------------------------------


def test_our_weights_and_transformers_are_the_same_from_the_same_parameters(bert):
    ours = TextEncoder(V, 11, 24, 4, 29, 2).eval()
    ours.load_state_dict(from_bert(bert.state_dict()))
    torch.testing.assert_close(weights_of(ours, IDS), weights_of(bert, IDS), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights_of(ours, IDS), ours(IDS, return_weights=True)[1].detach())
    real = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    mine = weights_of(ours, IDS, mask=real[:, None, None])
    theirs = weights_of(bert, IDS, attention_mask=real.long())
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert (mine[:, 1, :, :, 3:] == 0).all()


def test_weights_of_a_causal_model_come_out_though_it_never_forms_them(llama):
    torch.manual_seed(0)
    flash = GPT(V, E, 2, H, max_len=N).eval()
    plain = GPT(V, E, 2, H, max_len=N, op=attention).eval()
    plain.load_state_dict(flash.state_dict())
    weights = weights_of(flash, IDS)
    assert weights.shape == (2, B, H, N, N) and (weights.triu(1) == 0).all()
    torch.testing.assert_close(weights, weights_of(plain, IDS))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, B, H, N))
    assert (weights_of(llama, IDS).triu(1) == 0).all()


def test_a_model_is_afterwards_as_it_was(llama):
    model = Encoder(E, H, 24, 2, dropout=0.5)
    model.layers[1].eval()
    x = torch.randn(B, N, E)
    assert torch.equal(weights_of(model, x), weights_of(model, x))  # without dropout
    modes = [module.training for module in model.modules()]
    with pytest.raises(ValueError, match="mask"):
        weights_of(model, x, mask=torch.ones(N + 1, N, dtype=torch.bool))
    assert [module.training for module in model.modules()] == modes and model.training and not model.layers[1].training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    _, weights = model.eval()(x, return_weights=True)
    torch.testing.assert_close(weights_of(model, x, return_weights=True), weights.detach())
    before = llama.config._attn_implementation
    weights_of(llama, IDS)
    with pytest.raises(IndexError):
        weights_of(llama, IDS + V)
    assert llama.config._attn_implementation == before == "sdpa"


def test_weights_that_there_are_not_are_refused():
    with pytest.raises(ValueError, match="return_weights must be False for flash attention, which never forms them"):
        weights_of(Encoder(E, H, 24, 2, op=FlashAttention()), torch.randn(B, N, E))
    with pytest.raises(TypeError, match="ids must be a Tensor, got list"):
        weights_of(Encoder(E, H, 24, 2), [[1, 2]])
    with pytest.raises(ValueError, match=r"the layers' weights must be of one shape \(B, H, N, N\), got"):
        weights_of(
            nn.Sequential(MultiHeadAttention(E, H), MultiHeadAttention(E, 2)),
            torch.randn(B, N, E),
        )


# --- profiles --------------------------------------------------------------------------------------------------------


def maps(*heads: torch.Tensor) -> torch.Tensor:
    """One layer and one sequence of the given maps (N, N)."""
    return torch.stack(heads)[None, None]


def on_key(n: int, offset: int) -> torch.Tensor:
    """Each query looks at the key `offset` away and nowhere else; at the edge, at itself."""
    at = torch.arange(n)
    key = torch.where((at + offset).clamp(0, n - 1) == at + offset, at + offset, at)
    return torch.eye(n)[key]


def test_pure_heads_have_a_profile_of_ones_and_zeros():
    n = 6
    first = torch.eye(n)[torch.zeros(n, dtype=torch.long)]
    even = torch.full((n, n), 1 / n)
    found = profile(maps(on_key(n, -1), on_key(n, 1), on_key(n, 0), first, even))
    assert {name: tuple(value.shape) for name, value in found.items()} == dict.fromkeys(
        ("previous", "next", "same", "first", "distance", "entropy"), (1, 5)
    )
    previous, following, same, to_first, uniform = range(5)
    assert found["previous"][0, previous] == 1 and found["next"][0, following] == 1
    assert found["same"][0, same] == 1 and found["first"][0, to_first] == 1
    assert found["next"][0, previous] == found["previous"][0, following] == found["previous"][0, same] == 0
    assert found["same"][0, previous] == pytest.approx(1 / n)  # the first query has nothing before it
    assert found["first"][0, previous] == pytest.approx(1 / (n - 1))  # to the second query the first is the one before
    assert found["distance"][0, same] == 0 and found["distance"][0, to_first] == pytest.approx(2.5)
    assert found["entropy"][0, :4].abs().max() == 0
    assert found["entropy"][0, uniform] == pytest.approx(math.log(n))
    for name in ("previous", "next", "same", "first"):
        assert found[name][0, uniform] == pytest.approx(1 / n)


def test_in_a_causal_map_what_a_query_cannot_reach_and_the_first_query_do_not_count():
    n = 6
    even = torch.ones(n, n).tril() / torch.arange(1, n + 1)[:, None]
    found = profile(maps(on_key(n, -1), even))
    assert found["previous"][0, 0] == 1 and found["same"][0, 0] == 0  # the first query, which must see itself, aside
    assert (found["next"] == 0).all()
    assert found["entropy"][0, 1] == pytest.approx(sum(math.log(i) for i in range(2, n + 1)) / (n - 1))
    assert found["same"][0, 1] == pytest.approx(sum(1 / i for i in range(2, n + 1)) / (n - 1))
    assert found["distance"][0, 0] == 1 and found["distance"][0, 1] == pytest.approx(1.5)
    assert profile(maps(torch.ones(1, 1)))["entropy"].isnan().all()  # no query has a choice


def test_the_profile_of_uneven_maps_equals_a_literal_loop():
    """Two layers, two sequences, weights from 1e-20 to 1: every number by a loop over queries and keys."""
    weights = (12 * draw(2, B, H, N, N)).softmax(-1)
    found = profile(weights, IDS)
    for layer_, head in ((0, 0), (1, 3)):
        sums = {name: [] for name in found}
        for row in range(B):
            for i in range(N):
                a = weights[layer_, row, head, i].tolist()
                sums["same"].append(a[i])
                sums["distance"].append(sum(a[j] * abs(i - j) for j in range(N)))
                sums["entropy"].append(-sum(share * math.log(share) for share in a))
                if i > 0:
                    sums["previous"].append(a[i - 1])
                    sums["first"].append(a[0])
                if i < N - 1:
                    sums["next"].append(a[i + 1])
                followed = [j for j in range(1, i + 1) if IDS[row, j - 1] == IDS[row, i]]
                if followed:
                    sums["induction"].append(sum(a[j] for j in followed))
        for name, each in sums.items():
            assert found[name][layer_, head] == pytest.approx(sum(each) / len(each), rel=1e-9), name


def test_the_induction_score_of_a_repeated_sequence():
    """a b c a b c: from its second round on, the query's token was followed by one key, 2 positions back."""
    ids = torch.tensor([[3, 8, 5, 3, 8, 5]])
    n = 6
    back_two, back_three, even = on_key(n, -2), on_key(n, -3), torch.ones(n, n).tril() / torch.arange(1, n + 1)[:, None]
    found = profile(maps(back_two, back_three, even), ids)
    assert found["induction"][0].tolist() == pytest.approx([1, 0, (1 / 4 + 1 / 5 + 1 / 6) / 3])
    # all that followed: after x x x, the third x was preceded by two, and may be itself one that followed
    ids = torch.tensor([[4, 4, 4, 9]])
    assert profile(maps(on_key(4, 0)), ids)["induction"] == 1  # the second and third query stand after an x themselves
    assert profile(maps(on_key(4, -1)), ids)["induction"] == pytest.approx(1 / 2)  # queries 1 and 2; key 0 follows none
    # before the first key stands nothing, which is not the token 0
    assert profile(maps(on_key(4, -2)), torch.tensor([[0, 8, 0, 8]]))["induction"] == 0
    # a model that reads both ways: only what came before counts
    ahead = on_key(6, 1)
    assert profile(maps(ahead, back_two), torch.tensor([[3, 8, 5, 3, 8, 5]]))["induction"].tolist() == [[0, 1]]
    with pytest.raises(ValueError, match="ids must hold a token twice or more for the induction score"):
        profile(maps(back_two), torch.arange(n)[None])


def test_padding_does_not_count():
    """A padded batch has the profile and the overlap of its sequences one by one, each weighed by its length."""
    generator = torch.Generator().manual_seed(0)
    lengths, n = (4, 6), 6
    ids = torch.tensor([[1, 2, 1, 2, 0, 0], [1, 2, 3, 1, 2, 3]])
    for side, causal in (("right", False), ("right", True), ("left", False), ("left", True)):
        alone, whole = [], torch.zeros(1, 2, 3, n, n)
        real = torch.zeros(2, n, dtype=torch.bool)
        placed = torch.zeros(2, n, dtype=torch.long)
        for row, length in enumerate(lengths):
            scores = torch.randn(1, 1, 3, length, length, generator=generator)
            scores = (
                scores.masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), -math.inf)
                if causal
                else scores
            )
            alone.append(scores.softmax(-1))
            start = n - length if side == "left" else 0
            here = slice(start, start + length)
            whole[:, row, :, here, here] = alone[-1][:, 0]
            real[row, here], placed[row, here] = True, ids[row, :length]
        whole[0, 0, :, ~real[0]] = 1 / n if not causal else 0  # what padding looks at does not matter
        parts = [profile(each, ids[row : row + 1, :length]) for row, (each, length) in enumerate(zip(alone, lengths))]
        found = profile(whole, placed, real=real)
        one_less = int(causal)
        counted = {"previous": 1, "next": 1, "first": 1, "same": one_less, "distance": one_less, "entropy": one_less}
        for name, fewer in counted.items():
            sizes = [length - fewer - (name == "next" and causal) for length in lengths]
            if name == "next" and causal:
                assert (found[name] == 0).all()
                continue
            expected = sum(size * part[name] for size, part in zip(sizes, parts)) / sum(sizes)
            torch.testing.assert_close(found[name], expected, msg=lambda m, at=(side, causal, name): f"{at}: {m}")
        expected = (2 * parts[0]["induction"] + 3 * parts[1]["induction"]) / 5
        torch.testing.assert_close(found["induction"], expected)
        sizes = [length - one_less for length in lengths]
        expected = sum(size * overlap(each) for size, each in zip(sizes, alone)) / sum(sizes)
        torch.testing.assert_close(overlap(whole, real=real), expected)


def test_a_trained_model_has_one_head_that_looks_at_the_word_before(encoder):
    ids = torch.tensor([encoder.tokenizer.encode(SENTENCE).ids])
    found = profile(weights_of(encoder.model, ids))
    assert found["previous"].argmax() == 2 and found["previous"][0, 2] > 0.99
    assert found["entropy"].max() < math.log(ids.shape[1])


# --- overlap ---------------------------------------------------------------------------------------------------------


def test_equal_maps_overlap_wholly_and_disjoint_ones_not_at_all():
    n = 6
    even = torch.full((n, n), 1 / n)
    ring = torch.roll(torch.eye(n), 1, 1)
    found = overlap(torch.cat([maps(ring, ring.T, ring, even), maps(even, ring, even, even)]))
    assert found.shape == (2, 4, 4) and torch.equal(found, found.mT)
    torch.testing.assert_close(found.diagonal(0, 1, 2), torch.ones(2, 4))
    assert found[0, 0, 1] == 0 and found[0, 0, 2] == 1
    torch.testing.assert_close(found[0, 3, :3], torch.full((3,), 1 / n))
    torch.testing.assert_close(found[1, 0], torch.tensor([1, 1 / n, 1, 1]))


def test_overlap_is_one_minus_the_total_variation_distance():
    weights = draw(2, 3, H, N, N).softmax(-1)
    found = overlap(weights)
    for a in range(H):
        for b in range(H):
            distance = (weights[:, :, a] - weights[:, :, b]).abs().sum(-1).mean((1, 2)) / 2
            torch.testing.assert_close(found[:, a, b], 1 - distance)


def test_in_a_causal_map_the_first_query_does_not_make_heads_alike():
    one, other = torch.eye(3), torch.tensor([[1.0, 0, 0], [1, 0, 0], [1, 0, 0]])
    assert overlap(maps(one, other))[0, 0, 1] == 0


def test_maps_of_another_shape_are_refused():
    for function in (profile, overlap):
        with pytest.raises(ValueError, match=r"weights must be \(layers, B, H, N, N\), got \(4, 5, 5\)"):
            function(torch.zeros(4, 5, 5))
        with pytest.raises(TypeError, match="weights must be a Tensor, got list"):
            function([[1.0]])
        with pytest.raises(ValueError, match=r"real must be \(B, N\) = \(1, 3\), got \(3,\)"):
            function(maps(torch.eye(3)), real=torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"ids must be \(B, N\) = \(1, 3\), got \(1, 4\)"):
        profile(maps(torch.eye(3)), torch.zeros(1, 4, dtype=torch.long))


# --- the example -----------------------------------------------------------------------------------------------------


def test_the_example_of_the_package_runs_and_prints_what_it_says():
    tests = doctest.DocTestFinder(recurse=False).find(nondual.analysis, "nondual.analysis")
    assert sum(len(test.examples) for test in tests) >= 8
    for test in tests:
        assert doctest.DocTestRunner().run(test).failed == 0


def test_all_heads_are_pairs(encoder):
    assert len(all_heads(encoder.model)) == 72
