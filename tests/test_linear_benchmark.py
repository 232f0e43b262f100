"""The benchmark of linear attention, as far as it runs without a GPU: its tensors, its look at our kernels."""

import importlib.metadata

import pytest
import torch

from benchmarks import linear


@pytest.mark.parametrize("form", linear.FORMS)
def test_its_look_at_our_kernels_finds_them_right(form):
    found = linear.look(form)
    assert {"out", "state", "dq", "dk", "dv"} <= set(found)
    assert ("dlog_decay" in found, "dbeta" in found) == (form in ("decayed", "gated delta"), "delta" in form)
    assert max(found.values()) < 1e-5, found


def test_its_tensors_are_laid_out_as_a_module_makes_them():
    given = linear.drawn("gated delta", 2, 7, 3, 4, 5, "cpu", torch.bfloat16)
    assert {name: tuple(x.shape) for name, x in given.items()} == {
        "q": (2, 7, 3, 4), "k": (2, 7, 3, 4), "v": (2, 7, 3, 5), "log_decay": (2, 7, 3), "beta": (2, 7, 3),
    }  # fmt: skip
    assert all(x.is_contiguous() for x in given.values()) and given["log_decay"].dtype == torch.float32


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it runs")
def test_without_a_gpu_it_says_so(capsys):
    linear.main([])
    assert capsys.readouterr().out == "linear: passed over; it needs a CUDA device\n"


def test_the_peer_it_names_is_the_one_that_is_tested_against():
    assert importlib.metadata.version("fla-core").startswith("0.6")
