"""The GPT against transformers' GPT-2 with copied random weights; what all models share is in test_causal.py."""

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from nondual.efficient_attention.flash_attention import FlashAttention
from nondual.language_models.gpt import GPT
from nondual.positional_encoding import LearnedPositions, Sinusoidal
from nondual.relative_positions import ALiBi, RelativeBias, Rotary

B, N, V, E, HEADS, LAYERS, LONGEST = 2, 11, 31, 12, 3, 2, 24

# Theirs by ours. Their linear layers keep the transpose of the weight; queries, keys and values share one.
NAMES = {
    "out_proj": "attn.c_proj",
    "linear1": "mlp.c_fc",
    "linear2": "mlp.c_proj",
    "norm1": "ln_1",
    "norm2": "ln_2",
}


@pytest.fixture(scope="module")
def pair():
    """Ours, and transformers' with its weights, in float64."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=V,
        n_positions=LONGEST,
        n_embd=E,
        n_layer=LAYERS,
        n_head=HEADS,
        activation_function="gelu",
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    theirs, ours = GPT2LMHeadModel(config).double().eval(), GPT(V, E, LAYERS, HEADS, max_len=LONGEST).double()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.4)
    given = theirs.state_dict()
    state = {
        "embeddings.weight": given["transformer.wte.weight"],
        "positions.table.weight": given["transformer.wpe.weight"],
        "norm_f.weight": given["transformer.ln_f.weight"],
        "norm_f.bias": given["transformer.ln_f.bias"],
    }
    for name in ours.state_dict():
        if not name.startswith("layers."):
            continue
        _, i, *path, kind = name.split(".")
        block = f"transformer.h.{i}."
        if path[-1] in NAMES:
            tensor = given[f"{block}{NAMES[path[-1]]}.{kind}"]
        else:
            tensor = given[f"{block}attn.c_attn.{kind}"].chunk(3, -1)["qkv".index(path[-1][0])]
        state[name] = tensor.T if tensor.ndim == 2 else tensor
    ours.load_state_dict(state)
    return ours, theirs


def tokens(length=N):
    return torch.randint(V, (B, length), generator=torch.Generator().manual_seed(1))


def test_it_is_transformers_gpt2_forward_and_backward(pair):
    ours, theirs = pair
    loss, scores = ours.loss(tokens()), theirs(tokens()).logits
    judged = F.cross_entropy(scores[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten())
    torch.testing.assert_close(ours(tokens()), scores)
    torch.testing.assert_close(loss, judged)
    loss.backward()
    judged.backward()
    torch.testing.assert_close(ours.embeddings.weight.grad, theirs.transformer.wte.weight.grad)
    torch.testing.assert_close(ours.positions.table.weight.grad, theirs.transformer.wpe.weight.grad)
    stacked = [getattr(ours.layers[0].mixer, f"{name}_proj").weight.grad for name in "qkv"]
    torch.testing.assert_close(torch.cat(stacked).T, theirs.transformer.h[0].attn.c_attn.weight.grad)


@pytest.mark.parametrize("cached", [True, False])
def test_greedy_it_writes_what_transformers_writes(pair, cached):
    ours, theirs = pair
    expected = theirs.generate(tokens(4), max_new_tokens=12, do_sample=False)
    assert torch.equal(ours.generate(tokens(4), 12, cached=cached), expected)


@pytest.mark.parametrize("cached", [True, False])
def test_padded_on_the_left_it_writes_what_transformers_writes(pair, cached):
    ours, theirs = pair
    ids, real = tokens(7), torch.ones(B, 7, dtype=torch.long)
    ids[1, :4] = real[1, :4] = 0
    expected = theirs.generate(ids, attention_mask=real, max_new_tokens=9, do_sample=False)
    reset = torch.zeros(B, 7, dtype=torch.bool)
    reset[0, 0] = reset[1, 4] = True
    assert torch.equal(ours.generate(ids, 9, reset=reset, cached=cached), expected)


def test_flash_attention_where_no_mask_is_needed(pair):
    """Packed sequences need a mask, and plain attention takes it; with a window in its place, that is an error."""
    ours, reset = pair[0], torch.zeros(B, N, dtype=torch.bool)
    reset[:, 5] = True
    torch.testing.assert_close(ours(tokens(), reset=reset)[:, 5:], ours(tokens()[:, 5:]))
    windowed = GPT(V, E, LAYERS, HEADS, max_len=LONGEST, op=FlashAttention(window=3)).double()
    windowed.load_state_dict(ours.state_dict())
    torch.testing.assert_close(windowed(tokens())[:, :3], ours(tokens())[:, :3])
    with pytest.raises(ValueError, match="mask must be None for flash attention"):
        windowed(tokens(), reset=reset)


# --- positions of other kinds -----------------------------------------------------------------------------------------


def test_positions_are_added_or_go_into_every_layer():
    assert isinstance(GPT(V, E, LAYERS, HEADS, max_len=LONGEST).positions, LearnedPositions)
    code = Sinusoidal(E)
    model = GPT(V, E, LAYERS, HEADS, positions=code)
    assert model.positions is code and all(layer.mixer.positions is None for layer in model.layers)
    none = GPT(V, E, LAYERS, HEADS)
    assert none.positions is None and all(layer.mixer.positions is None for layer in none.layers)
    for inside in (Rotary(4), ALiBi(HEADS), RelativeBias(HEADS)):
        model = GPT(V, E, LAYERS, HEADS, positions=inside)
        assert model.positions is None and all(layer.mixer.positions is inside for layer in model.layers)
    own = GPT(V, E, LAYERS, HEADS, positions=lambda i: RelativeBias(HEADS) if i else None)
    assert own.layers[0].mixer.positions is None and isinstance(own.layers[1].mixer.positions, RelativeBias)


def test_a_shared_bias_is_one_parameter_and_gets_the_gradient_of_all_layers():
    shared, ids = GPT(V, E, LAYERS, HEADS, positions=RelativeBias(HEADS, causal=True)).double(), tokens()
    own = GPT(V, E, LAYERS, HEADS, positions=lambda _: RelativeBias(HEADS, causal=True)).double()
    own.load_state_dict(shared.state_dict())
    sizes = [sum(p.numel() for p in model.parameters()) for model in (shared, own)]
    assert sizes[1] - sizes[0] == (LAYERS - 1) * 32 * HEADS
    for model in (shared, own):
        model.loss(ids).backward()
    parts = [layer.mixer.positions.table.weight.grad for layer in own.layers]
    torch.testing.assert_close(shared.layers[0].mixer.positions.table.weight.grad, sum(parts))


@pytest.mark.parametrize(
    "options, error, says",
    [
        (
            {"positions": Rotary(4), "max_len": 9},
            ValueError,
            "max_len makes a learned table and cannot go with position",
        ),
        ({"positions": Rotary(6)}, ValueError, r"positions must be Rotary\(4\), of the head width, got Rotary"),
        (
            {"positions": lambda i: Sinusoidal(E)},
            TypeError,
            "positions must be Rotary, .*, got Sinusoidal; what is added",
        ),
        ({"positions": "rotary"}, TypeError, "positions must be Rotary, .*, got str"),
    ],
)
def test_positions_that_do_not_fit(options, error, says):
    with pytest.raises(error, match=says):
        GPT(V, E, LAYERS, HEADS, **options)
