"""The files that the essay names, as they were counted, and what stands here in their place."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from ledger import load
from ledger_page import PATHS

ROOT = Path(__file__).parent.parent
COUNTED = json.loads((ROOT / "docs/measured/essay_codebase.json").read_text())["figures"]["rows"]

X = torch.randn(1, 3, 8)
COMPUTES = {  # for each of the essay's paths that stands here: something it computes
    "attention_mechanism": lambda room: room.AdditiveAttention(8, 8, 4)(X, X)[0],
    "self_attention": lambda room: room.MultiHeadAttention(8, 2)(X),
    "transformer": lambda room: room.Encoder(8, 2, 16, n_layers=2)(X),
    "positional_encoding": lambda room: room.LearnedPositions(8, 8)(3),
    "efficient_attention/mamba": lambda room: room.Mamba(8)(X),
    "efficient_attention/flash_attention": lambda room: room.FlashAttention()(*X.view(3, 1, 1, 1, 8).requires_grad_()),
}


def stands_here(path):
    return (ROOT / "src/nondual" / f"{path}.py").exists()


@pytest.mark.parametrize("path", [path for path in PATHS if stands_here(path)])
def test_a_path_of_the_essay_that_stands_here_computes(path):
    out = COMPUTES[path](importlib.import_module("nondual." + path.replace("/", ".")))
    assert out.isfinite().all()
    out.sum().backward()  # and can be learned


@pytest.mark.claim("A0.3", "does not hold")
def test_not_every_claim_can_be_checked_in_the_files_that_the_essay_names():
    """Eight of the thirteen hold no arithmetic; and what a text means is settled by no file of code."""
    assert [Path(row["path"]).with_suffix("").as_posix() for row in COUNTED] == [
        f"ml_research/attention/{p}" for p in PATHS
    ]
    silent = [row["path"] for row in COUNTED if row["arithmetic"] == 0]
    assert len(COUNTED) == 13 and len(silent) == 8
    assert all(row["text_share"] > 0.5 for row in COUNTED)
    about_texts = [claim.id for claim in load(ROOT) if claim.guess == "reading" and claim.id.startswith("A")]
    assert len(about_texts) >= 10 and not any(claim.test for claim in load(ROOT) if claim.verdict == "reading")
