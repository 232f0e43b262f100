"""Heads recorded and replaced: against what the layers compute, in our models and in transformers'."""

import pytest
import torch
from analysis_cases import watched
from torch import nn
from transformers import AlbertConfig, AlbertModel, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from nondual import GPT, Encoder, MambaLM, TextEncoder
from nondual.analysis import (
    all_heads,
    attention_layers,
    mean_values,
    patch_heads,
    record_heads,
    replace_heads,
    resample_values,
    weights_of,
)

B, N, V, E, H, D, LAYERS = 3, 7, 23, 20, 5, 4, 3
SIZES = {
    "vocab_size": V,
    "hidden_size": E,
    "intermediate_size": 29,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": H,
}
MODELS = {
    "text encoder": lambda: TextEncoder(V, 11, E, H, 29, LAYERS),
    "gpt": lambda: GPT(V, E, LAYERS, H, max_len=11, n_kv_heads=1),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1)),
    "bert": lambda: BertModel(BertConfig(**SIZES)),
    "albert": lambda: AlbertModel(AlbertConfig(**SIZES, embedding_size=7)),
}


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]().double().eval()


@pytest.fixture
def gpt():
    torch.manual_seed(0)
    return MODELS["gpt"]().double().eval()


IDS = torch.randint(V, (B, N), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def scores(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    out = model(ids)
    return out if isinstance(out, torch.Tensor) else out[0]


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


# --- recording -------------------------------------------------------------------------------------------------------


def test_a_heads_recorded_output_is_its_weights_times_its_values(model):
    layers = attention_layers(model)
    with record_heads(model) as record, watched({layer.value for layer in layers}) as seen:
        scores(model)
    values = [out for _, out in seen]
    assert len(record.outputs) == len(values) == LAYERS
    for weights, value, layer, output in zip(weights_of(model, IDS), values, layers, record.outputs):
        shared = value.unflatten(-1, (layer.n_kv_heads, D)).repeat_interleave(H // layer.n_kv_heads, 2)
        torch.testing.assert_close(output, torch.einsum("bhnm,bmhd->bnhd", weights, shared), rtol=1e-6, atol=1e-9)


def test_recorded_outputs_through_the_projection_are_the_layers_output(model):
    layers = attention_layers(model)
    with record_heads(model) as record, watched({layer.output for layer in layers}) as seen:
        scores(model)
    for layer, output, (_, out) in zip(layers, record.outputs, seen):
        assert output.shape == (B, N, H, D)
        torch.testing.assert_close(layer.output(output.flatten(-2)), out, rtol=0, atol=0)


def test_a_recording_changes_nothing_and_leaves_no_hook(model):
    before, count = scores(model), hooks(model)
    with record_heads(model), record_heads(model, gradients=True):
        assert torch.equal(scores(model), before)
        assert hooks(model) > count
    assert hooks(model) == count


def test_outputs_are_those_of_the_last_call_and_stay(gpt):
    with record_heads(gpt) as record:
        with pytest.raises(RuntimeError, match="every layer must have run within record_heads"):
            _ = record.outputs
        scores(gpt)
        first = record.outputs
        scores(gpt, IDS[:, :2])
    scores(gpt)  # outside: not recorded
    assert [output.shape[1] for output in record.outputs] == [2] * LAYERS
    assert [output.shape[1] for output in first] == [N] * LAYERS
    torch.testing.assert_close(record.outputs[-1], first[-1][:, :2])


def test_gradients_reach_the_recorded_outputs_if_asked(model):
    with record_heads(model) as record:
        model(IDS)
    assert not any(output.requires_grad for output in record.outputs)
    with record_heads(model, gradients=True) as record:
        out = model(IDS)
    loss = (out if isinstance(out, torch.Tensor) else out[0])[0, -1].square().sum()
    gradients = torch.autograd.grad(loss, record.outputs)
    for layer in range(LAYERS):
        nudge = torch.zeros(B, N, D, dtype=torch.double, requires_grad=True)
        with replace_heads(model, {(layer, 2): lambda output, nudge=nudge: output + nudge}):
            out = model(IDS)
        loss = (out if isinstance(out, torch.Tensor) else out[0])[0, -1].square().sum()
        (expected,) = torch.autograd.grad(loss, nudge)
        assert expected.abs().sum() > 0
        torch.testing.assert_close(gradients[layer][:, :, 2], expected, rtol=1e-6, atol=1e-9)


def test_autocast_records_and_takes_the_dtype_of_the_layer(gpt):
    gpt = gpt.float()
    with torch.autocast("cpu", torch.bfloat16), record_heads(gpt) as record:
        before = scores(gpt)
    assert {output.dtype for output in record.outputs} == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        with replace_heads(gpt, {(0, 1): record.outputs[0][:, :, 1].double()}):
            assert torch.equal(scores(gpt), before)


# --- replacing -------------------------------------------------------------------------------------------------------


def test_a_head_replaced_by_its_own_output_changes_nothing_to_the_bit(model):
    with record_heads(model) as record:
        before = scores(model)
    own = {(layer, head): record.outputs[layer][:, :, head] for layer, head in all_heads(model)}
    with replace_heads(model, own):
        assert torch.equal(scores(model), before)
    with replace_heads(model, {pair: lambda output: output for pair in own}):
        assert torch.equal(scores(model), before)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "albert"])
def test_a_head_replaced_by_zero_is_a_head_without_columns_in_the_projection(name):
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    with replace_heads(model, {(1, 2): 0.0, (0, 4): 0}):
        replaced = scores(model)
    before = scores(model)
    with torch.no_grad():
        for layer, head in ((1, 2), (0, 4)):
            attention_layers(model)[layer].output.weight[:, head * D : (head + 1) * D] = 0
    torch.testing.assert_close(replaced, scores(model), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(replaced, before)


def test_one_use_of_a_shared_layer_is_replaced_and_the_others_are_not():
    torch.manual_seed(0)
    model = MODELS["albert"]().double().eval()
    with record_heads(model) as clean:
        scores(model)
    with replace_heads(model, {(1, 2): 7.0}), record_heads(model) as record:
        scores(model)
        with pytest.raises(IndexError), torch.no_grad():
            model(torch.full((1, 2), V))  # raises before any layer
        scores(model)
    assert torch.equal(record.outputs[0], clean.outputs[0])
    assert (record.outputs[1][:, :, 2] == 7).all() and (record.outputs[1][:, :, 3] == clean.outputs[1][:, :, 3]).all()
    assert not (record.outputs[2] == 7).any() and not torch.allclose(record.outputs[2], clean.outputs[2])


def test_a_pass_that_raises_half_way_does_not_shift_the_layers_of_a_shared_one():
    torch.manual_seed(0)
    model = MODELS["albert"]().double().eval()
    calls = []

    def raises_at_first(output):
        calls.append(output)
        if len(calls) == 1:
            raise InterruptedError
        return output * 0

    with record_heads(model) as record, replace_heads(model, {(1, 0): raises_at_first}):
        with pytest.raises(InterruptedError):
            scores(model)
        scores(model)
    with replace_heads(model, {(1, 0): 0.0}):
        with record_heads(model) as again:
            scores(model)
    torch.testing.assert_close(record.outputs[2], again.outputs[2])


def test_values_may_be_numbers_tensors_that_broadcast_and_functions(gpt):
    generator = torch.Generator().manual_seed(2)
    for shape in ((), (1,), (D,), (N, D), (N, 1), (1, 1, D), (B, 1, 1), (B, N, D)):
        value = torch.randn(shape, generator=generator)
        with replace_heads(gpt, {(2, 1): value}), record_heads(gpt) as record:
            scores(gpt)
        assert torch.equal(record.outputs[2][:, :, 1], value.double().expand(B, N, D))
    with replace_heads(gpt, {(2, 1): lambda output: -output, (2, 3): lambda _: 2, (1, 0): 3}):
        with record_heads(gpt) as record:
            scores(gpt)
    with replace_heads(gpt, {(1, 0): torch.tensor(3)}), record_heads(gpt) as other:
        scores(gpt)
    assert torch.equal(record.outputs[2][:, :, 1], -other.outputs[2][:, :, 1])
    assert (record.outputs[2][:, :, 3] == 2).all()


def test_contexts_act_in_the_order_in_which_they_are_opened(gpt):
    before = scores(gpt)
    with record_heads(gpt) as early, replace_heads(gpt, {(0, 0): 5.0}):
        with replace_heads(gpt, {(0, 0): lambda output: output + 1, (0, 1): 4.0}), record_heads(gpt) as late:
            scores(gpt)
        inner = late.outputs
        scores(gpt)
    assert torch.equal(late.outputs[0], inner[0])  # its context had ended
    assert (inner[0][:, :, 0] == 6).all() and (inner[0][:, :, 1] == 4).all()
    assert not (early.outputs[0][:, :, 0] == 5).any()
    assert torch.equal(scores(gpt), before)


def test_hooks_end_also_after_an_exception(model):
    before, count = scores(model), hooks(model)
    with pytest.raises(InterruptedError), replace_heads(model, {(0, 0): 9.0}), record_heads(model):
        raise InterruptedError
    assert hooks(model) == count and torch.equal(scores(model), before)


def test_a_value_lets_gradients_through(gpt):
    learned = torch.zeros(D, dtype=torch.double, requires_grad=True)
    with replace_heads(gpt, {(1, 1): learned}):
        gpt.loss(IDS).backward()
    assert learned.grad is not None and learned.grad.abs().sum() > 0
    assert gpt.layers[0].mixer.q_proj.weight.grad.abs().sum() > 0


def test_generation_by_a_cache_sees_the_replacement(gpt):
    usual = gpt.generate(IDS[:, :3], 5)
    with replace_heads(gpt, {pair: 1.0 for pair in all_heads(gpt)}):
        cached, read_again = (gpt.generate(IDS[:, :3], 5, cached=cached) for cached in (True, False))
    assert torch.equal(cached, read_again) and not torch.equal(cached, usual)


def test_what_does_not_fit_is_refused_at_the_door(gpt):
    for values, error, words in (
        ({(3, 0): 0.0}, ValueError, r"layer must be 0 to 2, got 3 in \(3, 0\)"),
        ({(0, 5): 0.0}, ValueError, "head of layer 0 must be 0 to 4, got 5"),
        ({0: 0.0}, TypeError, "a head must be a pair of ints"),
        ([(0, 0)], TypeError, r"values must be a dict from \(layer, head\) to a value, got list"),
        ({(0, 0): "0"}, TypeError, "the value of head 0 of layer 0 must be a number, a Tensor or a function, got str"),
        ({(0, 0): None}, TypeError, "must be a number, a Tensor or a function, got NoneType"),
        ({(0, 1): torch.zeros(D + 1)}, ValueError, r"head 1 of layer 0 must broadcast to \(B, N, 4\), got \(5,\)"),
        ({(0, 1): torch.zeros(1, B, N, D)}, ValueError, r"must broadcast to \(B, N, 4\), got \(1, 3, 7, 4\)"),
    ):
        with pytest.raises(error, match=words):
            replace_heads(gpt, values)  # before the context is entered
    for values, error, words in (
        ({(0, 1): torch.zeros(N - 1, D)}, ValueError, r"must broadcast to \(B, N, D\) = \(3, 7, 4\), got \(6, 4\)"),
        ({(0, 1): lambda output: output[0, :2]}, ValueError, r"= \(3, 7, 4\), got \(2, 4\)"),
        ({(0, 1): lambda output: None}, TypeError, "head 1 of layer 0 must return a Tensor, got NoneType"),
    ):
        count = hooks(gpt)
        with pytest.raises(error, match=words), replace_heads(gpt, values):
            scores(gpt)
        assert hooks(gpt) == count
    for function in (record_heads, lambda model: replace_heads(model, {})):
        with pytest.raises(ValueError, match="model must have attention heads, got MambaLM"):
            function(MambaLM(V, E, 2))
        with pytest.raises(TypeError, match=r"model must be an nn\.Module, got str"):
            function("gpt")


# --- what to put in their place --------------------------------------------------------------------------------------


def test_patching_puts_in_the_outputs_of_another_run(model):
    other = IDS.flip(1)
    with record_heads(model) as clean:
        scores(model, other)
    with record_heads(model) as own, patch_heads(model, clean, [(1, 2), (0, 0)], positions=[0, -1]):
        with record_heads(model) as patched:
            scores(model)
    with record_heads(model) as untouched:
        scores(model)
    torch.testing.assert_close(own.outputs[0], untouched.outputs[0])
    assert torch.equal(patched.outputs[0][:, [0, -1], 0], clean.outputs[0][:, [0, -1], 0])
    assert torch.equal(patched.outputs[0][:, 1:-1, 0], untouched.outputs[0][:, 1:-1, 0])
    assert torch.equal(patched.outputs[0][:, :, 1:], untouched.outputs[0][:, :, 1:])
    assert torch.equal(patched.outputs[1][:, [0, -1], 2], clean.outputs[1][:, [0, -1], 2])


def test_all_of_another_runs_heads_carry_its_answer():
    """Where the last position's own vector is the same, all heads patched there give the other run's output there."""
    torch.manual_seed(0)
    model = GPT(V, E, LAYERS, H, max_len=N).double().eval()
    other = IDS.clone()
    other[:, :-1] = IDS[:, :-1].flip(1)
    with record_heads(model) as clean:
        wanted = scores(model, other)
    with patch_heads(model, clean, all_heads(model), positions=[N - 1]):
        got = scores(model)
    torch.testing.assert_close(got[:, -1], wanted[:, -1], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(scores(model)[:, -1], wanted[:, -1])


def test_a_run_of_one_sequence_patches_a_batch_and_other_shapes_are_refused(gpt):
    with record_heads(gpt) as clean:
        scores(gpt, IDS[:1])
    with patch_heads(gpt, clean.outputs, [(0, 3)]), record_heads(gpt) as patched:
        scores(gpt)
    assert torch.equal(patched.outputs[0][:, :, 3], clean.outputs[0][:, :, 3].expand(B, N, D))
    with pytest.raises(ValueError, match="source must have recorded 3 layers, got 2"):
        patch_heads(gpt, clean.outputs[:2], [(0, 3)])
    with pytest.raises(ValueError, match=r"B, N, D = \(3, 6, 4\) or of batch 1, got \(1, 7, 4\)"):
        with patch_heads(gpt, clean, [(0, 3)]):
            scores(gpt, IDS[:, 1:])
    with record_heads(gpt) as pair:
        scores(gpt, IDS[:2])
    with pytest.raises(ValueError, match=r"B, N, D = \(3, 7, 4\) or of batch 1, got \(2, 7, 4\)"):
        with patch_heads(gpt, pair, [(0, 3)], positions=[0]):
            scores(gpt)
    with pytest.raises(ValueError, match="positions must lie in -7 to 6, got 7"):
        with patch_heads(gpt, clean, [(0, 3)], positions=[7]):
            scores(gpt)


def test_means_are_over_batch_and_positions_or_position_by_position(gpt):
    with record_heads(gpt) as record:
        scores(gpt)
    output = record.outputs[1][:, :, 3]
    assert torch.allclose(mean_values(record, [(1, 3)])[1, 3], output.mean((0, 1)))
    assert torch.allclose(mean_values(record.outputs, [(1, 3)], by_position=True)[1, 3], output.mean(0))
    real = torch.arange(N) < torch.tensor([[3], [7], [4]])
    kept = torch.cat([output[b, : int(n)] for b, n in enumerate(real.sum(1))])
    assert torch.allclose(mean_values(record, [(1, 3)], real=real)[1, 3], kept.mean(0))
    by_position = mean_values(record, [(1, 3)], by_position=True, real=real & (torch.arange(N) < 6))[1, 3]
    assert torch.allclose(by_position[3], output[1:, 3].mean(0)) and (by_position[6] == 0).all()
    with replace_heads(gpt, mean_values(record, [(1, 3)])), record_heads(gpt) as replaced:
        scores(gpt)
    assert torch.equal(replaced.outputs[1][0, 0, 3], replaced.outputs[1][2, 5, 3])
    with pytest.raises(ValueError, match=r"\(3, 0\) must be among the recorded heads; 3 layers were recorded"):
        mean_values(record, [(3, 0)])
    with pytest.raises(ValueError, match=r"real must be \(B, N\) = \(3, 7\), got \(3, 6\)"):
        mean_values(record, [(1, 3)], real=real[:, 1:])


def test_resampling_takes_another_sequences_output(gpt):
    with record_heads(gpt) as record:
        scores(gpt)
    order = torch.tensor([1, 2, 0])
    with replace_heads(gpt, resample_values([(0, 1), (0, 2)], order)), record_heads(gpt) as replaced:
        scores(gpt)
    assert torch.equal(replaced.outputs[0][:, :, 1:3], record.outputs[0][order][:, :, 1:3])
    assert torch.equal(replaced.outputs[0][:, :, 3:], record.outputs[0][:, :, 3:])
    with pytest.raises(ValueError, match=r"order must be a permutation of 0 to B - 1, got \[0, 0, 1\]"):
        resample_values([(0, 1)], torch.tensor([0, 0, 1]))
    with pytest.raises(ValueError, match=r"order must give every sequence another one's output, got \[0, 2, 1\]"):
        resample_values([(0, 1)], torch.tensor([0, 2, 1]))
    with pytest.raises(ValueError, match="order must have the batch's size 2, got 3"):
        with replace_heads(gpt, resample_values([(0, 1)], order)):
            scores(gpt, IDS[:2])


def test_vectors_go_in_where_a_model_takes_vectors():
    torch.manual_seed(0)
    model, x = Encoder(E, H, 29, 2, causal=True), torch.randn(B, N, E)
    with torch.no_grad(), record_heads(model) as record, replace_heads(model, {(0, 0): 0.0}):
        assert model(x).shape == x.shape
    assert [output.shape for output in record.outputs] == [(B, N, H, D)] * 2


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_model_runs_uncompiled_in_the_context(gpt, in_place):
    """Compiled code would not call the hooks, and a replacement would do nothing."""
    with replace_heads(gpt, {(0, 0): 9.0}), record_heads(gpt) as expected:
        wanted = scores(gpt)
    compiled = gpt if in_place else torch.compile(gpt, backend="eager")
    if in_place:
        gpt.compile(backend="eager")
    before = scores(compiled)
    with replace_heads(compiled, {(0, 0): 9.0}), record_heads(compiled) as record:
        assert torch.equal(scores(compiled), wanted)
    assert torch.equal(record.outputs[1], expected.outputs[1])
    assert weights_of(compiled, IDS).shape == (LAYERS, B, H, N, N)
    torch.testing.assert_close(scores(compiled), before)
    assert not torch.allclose(before, wanted)
