"""The speech transformer: small random ones against transformers' Whisper, its caches, and what its doors refuse."""

import pytest
import torch

from nondual.data import speech
from nondual.pretrained.speech import SpeechRecognizer, SpeechTransformer

V, E, HEADS, FF, LAYERS, MELS, FRAMES = 29, 12, 3, 17, 2, 7, 22


def small(seed=0, **more):
    """With random weights, each at a value of its own, and keys without biases, as Whisper's."""
    torch.manual_seed(seed)
    model = SpeechTransformer(V, E, HEADS, FF, LAYERS, max_len=13, n_mels=MELS, **more).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.uniform_(0.5, 1.5) if "norm" in name and "weight" in name else p.normal_(std=0.4)
            if name.endswith("k_proj.bias"):
                p.zero_()
    return model


def mels(batch=2, frames=FRAMES, seed=0):
    return torch.randn(batch, MELS, frames, generator=torch.Generator().manual_seed(seed))


def tokens(batch=2, n=11, seed=0):
    return torch.randint(V, (batch, n), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("frames", [FRAMES, 6])
def test_memory_scores_and_weights_equal_those_of_transformers(judge_of, frames):
    model, mel, ids = small(), mels(frames=frames), tokens()
    theirs = judge_of(model, frames)
    memory = model.encode(mel)
    assert memory.shape == (2, frames // 2, E)
    scores, weights = model(ids, memory, return_weights=True)
    out = theirs(input_features=mel, decoder_input_ids=ids, output_attentions=True)
    torch.testing.assert_close(memory, out.encoder_last_hidden_state, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(scores, out.logits, atol=1e-4, rtol=1e-4)
    assert weights.shape == (LAYERS, 2, HEADS, 11, frames // 2)
    torch.testing.assert_close(weights, torch.stack(out.cross_attentions), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_positions_of_the_encoder_are_whispers_own():
    from transformers.models.whisper.modeling_whisper import sinusoids

    code = small().double().time(1500)
    theirs = sinusoids(1500, E).double()
    torch.testing.assert_close(torch.cat([code[:, 0::2], code[:, 1::2]], 1), theirs, atol=2e-4, rtol=0)  # in float32


@torch.no_grad()
def test_with_caches_of_both_attentions_the_scores_are_those_of_the_whole_text():
    model, ids = small().double(), tokens()
    memory = model.encode(mels().double())
    whole = model(ids, memory)
    for read in (memory, model.decoder.project(memory)):
        cache = model.new_cache(2)
        parts = [model(part, read, cache=cache) for part in ids.split([3, 2, *[1] * 6], 1)]
        torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-12, rtol=1e-12)


@torch.no_grad()
def test_no_score_depends_on_a_later_token_and_each_row_is_its_own():
    model, ids = small(), tokens()
    memory, other = model.encode(mels()), ids.clone()
    other[:, 7:] = 0
    torch.testing.assert_close(model(ids, memory)[:, :7], model(other, memory)[:, :7])
    torch.testing.assert_close(model(ids[1:], model.encode(mels()[1:])), model(ids, memory)[1:], atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["decoder", "decoder.norm", "decoder.layers.1.mixer.out_proj", "token", "position.table"]
)
def test_a_part_that_raises_leaves_the_cache_as_it_was(name, held_by):
    model, ids = small(), tokens()
    memory, cache = model.encode(mels()), model.new_cache(2)
    model(ids[:, :4], memory, cache=cache)
    before = held_by(cache)
    handle = model.get_submodule(name).register_forward_hook(lambda *_: 1 / 0)
    for more in ({}, {"return_weights": True}):
        with pytest.raises(ZeroDivisionError):
            model(ids[:, 4:], memory, cache=cache, **more)
        assert held_by(cache) == before
    handle.remove()
    torch.testing.assert_close(model(ids[:, 4:], memory, cache=cache), model(ids, memory)[:, 4:], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_call_that_raises_leaves_the_cache_as_it_was():
    model, ids = small(), tokens()
    memory, cache = model.encode(mels()), model.new_cache(2, 5)
    model(ids[:, :4], memory, cache=cache)
    with pytest.raises(ValueError, match="cache holds 5 positions"):
        model(ids[:, 4:7], memory, cache=cache)
    with pytest.raises(ValueError, match="memory"):
        model(ids[:, 4:5], memory[:, :, :5], cache=cache)
    torch.testing.assert_close(model(ids[:, 4:5], memory, cache=cache)[:, 0], model(ids, memory)[:, 4])


def test_every_parameter_gets_a_gradient():
    model = small()
    model(tokens(), model.encode(mels())).logsumexp(-1).sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and (p.grad.any() or name.endswith("k_proj.bias")), name


def test_what_does_not_fit_is_refused():
    model = small()
    memory = model.encode(mels())
    for wrong in (torch.zeros(2, MELS), torch.zeros(2, MELS + 1, 8), torch.zeros(2, MELS, 0)):
        with pytest.raises(ValueError, match=rf"mel must be \(B, {MELS}, T\), from log_mel, got"):
            model.encode(wrong)
    with pytest.raises(ValueError, match="ids must"):
        model(torch.full((1, 3), V), memory[:1])
    with pytest.raises(ValueError, match="positions must lie in 0 to 12"):
        model(tokens(n=14), memory)
    with pytest.raises(ValueError, match="memory"):
        model(tokens(), torch.zeros(2, 5, E + 1))
    with pytest.raises(TypeError, match="mel must be a Tensor"):
        model.encode([1])
    with pytest.raises(ValueError, match="d_model must be even and 4 or more, got 2"):
        SpeechTransformer(V, 2, 1, FF, LAYERS, max_len=13)


# --- the recogniser -------------------------------------------------------------------------------------------------

MARKS = {"<|startoftranscript|>": 0, "<|notimestamps|>": 1, "<|endoftext|>": 2}


class Letters:
    """A tokenizer whose token i, from 3 on, is a letter."""

    def token_to_id(self, mark):
        return MARKS[mark]

    def decode(self, ids):
        return "".join("abcdefghijklmnopqrstuvwxyz"[i - 3] for i in ids)


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize(
    "never, not_first, text",
    [([5], [2], "a"), ([5], [], ""), ([5, 3], [2], "b"), ([], [2], "c" * 6), ([5], [2, 3], "b")],
)
def test_what_may_not_be_written_is_not(beams, never, not_first, text):
    """Every step likes c (5) best, then the end (2), a (3), b (4), and all others far less."""
    torch.manual_seed(0)
    model = SpeechTransformer(V, E, HEADS, FF, 1, max_len=12)
    model.decoder.norm.weight.zero_()
    model.decoder.norm.bias.copy_(torch.eye(E)[0])
    model.token.weight.zero_()
    model.token.weight[:, 0] = -99.0
    model.token.weight[[5, 2, 3, 4], 0] = torch.tensor([40.0, 30.0, 10.0, 5.0])
    recogniser = SpeechRecognizer(model, Letters(), suppressed=never, suppressed_first=not_first)
    assert recogniser.transcribe(torch.zeros(1000), beams=beams) == text


# --- the recogniser, with real weights ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sound, sentence",
    [
        (torch.zeros(0), r"N from 1 to 480000 \(30 s\), got torch.float32 \(0,\)"),
        (torch.zeros(480_001), r"N from 1 to 480000 \(30 s\), got torch.float32 \(480001,\): .*cut it"),
        (torch.zeros(2, 100), r"got torch.float32 \(2, 100\): take the mean of channels"),
        (torch.zeros(100, dtype=torch.int16), r"got torch.int16 \(100,\): .*divide 16-bit integers by 32768"),
        (torch.full((100,), 3000.0), r"sound must lie between -1 and 1, got 3000.0"),
        (torch.full((100,), torch.nan), r"sound must lie between -1 and 1, got nan"),
    ],
)
def test_what_is_no_sound_is_refused(recogniser, sound, sentence):
    for listen in (recogniser.transcribe, recogniser.attention):
        with pytest.raises(ValueError, match=sentence):
            listen(sound)


def test_another_rate_and_no_beams_are_refused(recogniser):
    with pytest.raises(ValueError, match="rate must be 16000 samples a second, got 44100: resample the sound first"):
        recogniser.transcribe(speech(), 44_100)
    with pytest.raises(ValueError, match="beams must be 1 or more, got 0"):
        recogniser.transcribe(speech(), beams=0)
    with pytest.raises(TypeError, match="sound must be a Tensor, got list"):
        recogniser.transcribe([0.0])
