"""The benchmark of the heads' roles, on small layers."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.roles import main, measure, share_of
from nondual.analysis import antisymmetric_share
from nondual.self_attention import MultiHeadAttention


def test_shares_are_the_librarys_own_and_chance_is_a_half():
    torch.manual_seed(0)
    layers = [MultiHeadAttention(40, 5), MultiHeadAttention(40, 5)]
    with torch.no_grad():
        layers[1].k_proj.weight.copy_(layers[1].q_proj.weight)
    found = measure(layers)
    assert found["heads"] == 10 and found["below a quarter"] == 5
    assert found["shares"][0] == [round(antisymmetric_share(layers[0], head), 4) for head in range(5)]
    assert found["shares"][1] == [0.0] * 5
    assert found["random entries"] == pytest.approx(0.5, abs=0.03) == found["random bases"]
    low, high = found["less than random bases"]["interval"]
    assert low < found["less than random bases"]["mean"] < high


def test_the_share_of_a_product_is_that_of_the_matrix():
    left, right = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    product = left @ right.T
    part = (product - product.T) / 2
    assert share_of(left, right.T) == pytest.approx(float(part.norm() ** 2 / product.norm() ** 2))


def test_tiny(capsys):
    main(["--tiny"])
    assert "'heads': 6" in capsys.readouterr().out
