"""benchmarks/bytes.py: that it runs, that every arm reads the same characters, and how noise and cuts are counted."""

import math
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from benchmarks import bytes, bytes_run
from benchmarks.bytes_cuts import cut_at, kinds_of, units_of, where_it_cuts
from benchmarks.bytes_run import (
    ARMS,
    TEXTS,
    Every,
    Run,
    Size,
    batch_of,
    carry_out,
    draw_of,
    in_tokens,
    measured,
    model_of,
    noised,
    read,
    segment_end,
    tokenizer_of,
)
from nondual.language_models.bytes import HNet
from nondual.tokenization import BPE, Bytes, Words


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small(monkeypatch):
    """Models of one size, so that none is searched for, and segments of a few words."""
    monkeypatch.setattr(bytes_run, "size_of", lambda arm, text: Size(48, 96, 1.0))
    monkeypatch.setattr(bytes, "size_of", bytes_run.size_of)
    monkeypatch.setattr(bytes_run, "LENGTH", 24)
    short = bytes_run.Text(
        *("\nthe king and the queen went to the wood, and the king came back" * n for n in (9, 2, 2))
    )
    monkeypatch.setattr(bytes_run, "read", lambda name: short)
    for kept in (bytes_run.tokenizer_of, bytes_run.train_tokens):
        kept.cache_clear()
    yield short
    for kept in (bytes_run.tokenizer_of, bytes_run.train_tokens):
        kept.cache_clear()


def test_it_runs_and_writes_nothing(threads, small, monkeypatch, capsys):
    monkeypatch.setattr(bytes, "write", None)  # to call it would raise
    bytes.main(["--tiny"])
    said = capsys.readouterr().out
    assert "learned pieces" in said and "unknown_tokens" in said


def test_a_run_is_kept(threads, small, tmp_path, monkeypatch):
    run = Run("learned pieces", "English", 1e-2, 3, 1, tmp_path)
    first = carry_out(run)
    assert run.file.exists() and set(first["noise"]) == {"0.0", "0.02", "0.05", "0.1"} and first["cuts"]["rate"] >= 0
    monkeypatch.setattr(bytes_run, "train", None)
    assert carry_out(run) == first


def test_the_two_scripts_are_measured_on_one_text():
    there, here = read("Devanagari").test, read("IAST").test
    assert "".join(units_of("IAST", here, there)) == here and "".join(units_of("Devanagari", there)) == there
    assert len(there.split()) == len(here.split())
    sizes = {text: sum(map(len, read(text))) for text in TEXTS}
    assert abs(sizes["English"] - sizes["IAST"]) < 10


def test_every_arm_draws_the_same_characters():
    for text in TEXTS[::2]:
        said = set()
        for arm in ("bytes", "subwords"):
            tokenizer = tokenizer_of(arm, text)
            inputs, labels = draw_of(arm, text)(torch.Generator().manual_seed(5))
            assert (inputs[:, 0] == tokenizer.vocabulary).all()
            assert torch.equal(inputs[:, 1:][labels[:, 1:] != -100], labels[:, :-1][labels[:, 1:] != -100])
            said.add(tuple(tokenizer.decode(row[row != -100].tolist()) for row in labels))
        assert len(said) == 1
        assert all(128 <= len(segment) <= 200 and segment[0].isspace() for segment in said.pop())


def test_segments_cover_a_text_once():
    text = "\nthe king and the queen went to the wood, and the king came back"
    for tokenizer in (Bytes(), Words.of(text), BPE.train(text, 280)):
        tokens = in_tokens(tokenizer, text)
        assert len(tokens.ids) == tokens.at[-1] and text[tokens.places[1]] == " "
        assert b"".join(tokens.pieces[tokens.at[1] : tokens.at[2]]).decode() == text[slice(*tokens.places[1:3])]
    ends = [0]
    while ends[-1] < len(tokens.places) - 1:
        ends.append(segment_end(tokens.places, ends[-1]))
    assert ends[-1] == len(tokens.places) - 1 and all(a < b for a, b in pairwise(ends))


def test_a_batch_is_filled_up_with_what_does_not_count():
    inputs, labels = batch_of([[5, 6, 7], [8]], 9)
    assert inputs.tolist() == [[9, 5, 6], [9, 0, 0]] and labels.tolist() == [[5, 6, 7], [8, -100, -100]]


def test_a_uniform_model_has_eight_bits_and_a_little(small):
    model = bytes_run.built("bytes", 256, 32, 32, 2.0)  # of 257 ids with the beginning
    torch.nn.init.zeros_(model.embeddings.weight)
    found = measured(model.eval(), Bytes(), small.test)
    assert found["bits_per_byte"] == pytest.approx(math.log2(257), abs=1e-4)
    assert found["bytes"] == found["tokens"] == len(small.test) and found["unknown_tokens"] == 0


def test_noise():
    text = "the king and the queen, 1 2 3\n" * 200
    assert noised(text, 0.0) == text and noised(text, 0.1) == noised(text, 0.1) != noised(text, 0.1, seed=1)
    for share in (0.02, 0.1):
        there = noised(text, share)
        kept = sum(a == b for a, b in zip(text.split("\n"), there.split("\n")))
        assert len(there.split("\n")) == 201 and there.count(" ") == text.count(" ") and there.count("1") == 200
        assert 0.3 * 22 * share < 1 - kept / 200 < 22 * share * 1.5
    assert len(noised("धर्मक्षेत्रे " * 50, 1.0)) != 13 * 50


def test_fixed_pieces_have_the_length_that_was_asked_for():
    x = torch.randn(2, 60, 3)
    for n in (2.0, 2.5, 6.17):
        p, cut = Every(n)(x)
        assert torch.equal(p, cut.float()) and cut[:, 0].all() and abs(cut[0].sum().item() - 60 / n) <= 1
        places = cut[0].nonzero().flatten()
        assert {int(d) for d in places.diff()} <= {int(n), int(n) + 1}


def test_kinds_of_places_by_hand():
    kinds = kinds_of("क् षि", units_of("Devanagari", "क् षि"))
    of = {name: there.nonzero().flatten().tolist() for name, there in kinds.items()}
    assert of["space"] == [6] and of["virama"] == [3] and of["vowel sign"] == [10]
    assert of["first letter of a word"] == [0, 7] and of["unit of the script"] == [0, 7]
    assert of["byte 2 of a character"] == [1, 4, 8, 11] and of["byte 3 of a character"] == [2, 5, 9, 12]
    latin = {name: there.nonzero().flatten().tolist() for name, there in kinds_of("rā ma").items()}
    assert latin["vowel"] == [1, 5] and latin["space"] == [3] and latin["byte 2 of a character"] == [2]


def test_cuts_of_a_model_are_counted_by_kind(small):
    torch.manual_seed(0)
    model = model_of("learned pieces", "English").eval()
    assert isinstance(model, HNet) and isinstance(model_of("fixed pieces", "English").chunking.router, Every)
    for projection in (model.chunking.router.q_proj, model.chunking.router.k_proj):
        torch.nn.init.normal_(projection.weight)
    cut, begins = cut_at(model, small.test, length=30)
    assert cut.shape == begins.shape == (len(small.test),) and 3 <= begins.sum() <= 5
    found = where_it_cuts(model, "English", small.train)
    everywhere = found["kinds"]["first byte of a character"]
    assert everywhere["of_bytes"] == everywhere["of_cuts"] == 1.0 and everywhere["cut"] == pytest.approx(found["rate"])
    assert set(ARMS) == {*bytes_run.ARMS_OF["IAST"]}
