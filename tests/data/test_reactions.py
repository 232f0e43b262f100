"""The reactions have a map of the right length; tests/pretrained/test_rxnmapper.py compares the elements."""

import re

from nondual.data import REACTIONS


def test_each_map_names_atoms_that_there_are():
    assert len(REACTIONS) >= 10
    for name, (reaction, origins) in REACTIONS.items():
        reactants, product = (re.findall(r"\[[^]]+]|Br|Cl|[BCNOcno]", side) for side in reaction.split(">>"))
        assert len(origins) == len(product), name
        numbers = [i for origin in origins for i in (origin if isinstance(origin, tuple) else (origin,))]
        assert min(numbers) >= 0 and max(numbers) < len(reactants), name
