"""benchmarks/in_context_known.py: how a sentence asks a pair, and what the commonest answer would get."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import in_context_known
from benchmarks.in_context_known import SENTENCES, commonest, known, main


class Letters:
    """A tokenizer: a token for each byte."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": list(text.encode())}


class Says(torch.nn.Module):
    """A model of bytes that always says one of them, and keeps what it reads."""

    def __init__(self, letter):
        super().__init__()
        self.embeddings, self.letter, self.read = torch.nn.Embedding(256, 2), ord(letter), []
        self.embeddings.register_forward_hook(lambda module, given, made: self.read.append(given[0]))

    def hidden(self, embedded):
        return embedded

    def scores(self, hidden):
        return torch.nn.functional.one_hot(torch.tensor(self.letter), 256).float().expand(*hidden.shape[:-1], 256)


def texts(model):
    return [bytes(row.tolist()).rstrip(b"\0").decode() for ids in model.read for row in ids]


def test_a_sum_is_written_as_the_sentence_has_it_and_its_answer_follows():
    model = Says("9")
    share = known(model, Letters(), "sums", "{ plus } is equal to ")
    assert share[0] == pytest.approx(8 / 36, abs=1e-4) == commonest(Letters(), "sums")
    assert texts(model)[0] == "<|im_start|>1 plus 1 is equal to 2\n" and len(texts(model)) == 36


def test_a_word_stands_in_its_sentence_and_a_space_before_the_answer_unless_it_is_quoted():
    model = Says(" ")
    assert known(model, Letters(), "capital", "The capital of {} is", 3) == [1, 1, 1]  # each answer begins with a space
    assert texts(model)[0].startswith("<|im_start|>The capital of ") and " is " in texts(model)[0]
    quoted = Says(" ")
    assert known(quoted, Letters(), "French", 'The French word for "{}" is "', 3) == [0, 0, 0]
    assert ' is "' in texts(quoted)[0] and ' is " ' not in texts(quoted)[0]


def test_each_task_has_three_sentences_with_one_place_for_the_question():
    for task, sentences in SENTENCES.items():
        assert len(set(sentences)) == 3, task
        assert all(sentence.count("{") == sentence.count("}") == 1 for sentence in sentences)


def test_the_benchmark_runs_on_a_few_pairs_and_writes_nothing(monkeypatch, capsys):
    import nondual.pretrained

    monkeypatch.setattr(nondual.pretrained, "our_smollm2", lambda: (Says("9"), Letters()))
    monkeypatch.setattr(in_context_known, "write", SimpleNamespace)  # would fail with the arguments that it is given
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    main(["--tiny"])
    assert capsys.readouterr().out.startswith("tiny ['past', 'opposite', 'capital', 'French', 'sums']")
