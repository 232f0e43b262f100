"""RXNMapper: its atom-mapping head on reactions whose maps are known, and what its door refuses."""

import subprocess
import sys

import pytest
import torch

from nondual.data import REACTIONS
from nondual.pretrained import RXNMAPPER, WeightsMissing, rxnmapper


@pytest.fixture(scope="module")
def chemist():
    return rxnmapper()


@pytest.fixture(scope="module")
def shares(chemist):
    """For each head (12, 8): how many product atoms give their greatest weight among the reactants to their origin."""
    right, count = torch.zeros(12, 8), 0
    for reaction, origins in REACTIONS.values():
        tokens, weights = chemist.attention(reaction)
        reactants, products = chemist.atoms(tokens)
        found = weights[:, :, products][..., reactants].argmax(-1)  # (layers, H, product atoms)
        for atom, origin in enumerate(origins):
            alike = torch.tensor(origin if isinstance(origin, tuple) else (origin,))
            right += torch.isin(found[:, :, atom], alike)
        count += len(origins)
    return right / count


def test_every_atom_has_an_origin_of_its_own_element(chemist):
    for name, (reaction, origins) in REACTIONS.items():
        tokens = chemist.tokens(reaction)
        reactants, products = chemist.atoms(tokens)
        assert len(origins) == len(products), name
        for atom, origin in zip(products, origins):
            for i in origin if isinstance(origin, tuple) else (origin,):
                assert tokens[reactants[i]].strip("[]+-").lower() == tokens[atom].strip("[]+-").lower(), (name, i)


def test_head_5_of_layer_10_maps_atoms_and_no_other_head_does(shares):
    assert shares[10, 5] > 0.95
    others = shares[:, [0, 1, 2, 3, 4, 6, 7]]  # the layers share weights: head 5 of another layer is the same matrices
    assert others.max() < 0.65 and shares.mean() < 0.3


def test_every_weight_of_the_file_is_used_and_attention_sums_to_one(chemist):
    assert sum(p.numel() for p in chemist.model.parameters()) == 767_616
    tokens, weights = chemist.attention("CC(=O)O.CO>>COC(C)=O")
    assert tokens[:4] == ["[CLS]", "C", "C", "("] and tokens[-1] == "[SEP]"
    assert weights.shape == (12, 8, len(tokens), len(tokens))
    torch.testing.assert_close(weights.sum(-1), torch.ones(12, 8, len(tokens)))


def test_tokens_that_the_vocabulary_lacks_are_unknown(chemist):
    ids = chemist.ids("[235U]>>[235U]")
    assert ids.shape == (1, 5) and ids[0, 1] == chemist.vocabulary["[UNK]"]


@pytest.mark.parametrize("reaction", ["CCO", "CC>>CO>>C", "water and salt", ""])
def test_what_is_no_reaction_is_refused(chemist, reaction):
    with pytest.raises(ValueError, match=r"reaction must be SMILES with one '>>' between reactants and products, got"):
        chemist.tokens(reaction)


def test_missing_and_changed_weights_are_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("NONDUAL_CACHE", str(tmp_path))
    with pytest.raises(WeightsMissing, match=r"of rxnmapper are not in .* `python -m nondual\.pretrained`"):
        rxnmapper()
    (tmp_path / RXNMAPPER.folder.name).mkdir()
    (tmp_path / RXNMAPPER.folder.name / "config.json").write_text("{}")
    with pytest.raises(RuntimeError, match=r"not the pinned ea0f314.*: delete it and fetch again"):
        rxnmapper()


def test_without_transformers_a_sentence_says_what_to_install():
    script = "import sys; sys.modules['transformers'] = None\nfrom nondual.pretrained import rxnmapper\nrxnmapper()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stderr.splitlines()[-1].endswith("pip install 'nondual[transformers]'")
