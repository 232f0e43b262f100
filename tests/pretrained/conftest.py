"""The real models, read once for each file of tests."""

import pytest

from nondual.pretrained import minilm, smollm2


@pytest.fixture(scope="module")
def encoder():
    return minilm()


@pytest.fixture(scope="module")
def smol():
    return smollm2()
