"""interventions"""

import torch

from nondual import GPT
from nondual.analysis import all_heads, record_heads, replace_heads, weights_of


def test_it():
    model = GPT(11, 8, 2, 2, max_len=9)
    ids = torch.arange(6)[None]
    with record_heads(model) as record:
        before = model(ids)
    with replace_heads(model, {(i, h): record.outputs[i][:, :, h] for i, h in all_heads(model)}):
        assert torch.equal(model(ids), before)
    assert weights_of(model, ids).shape == (2, 1, 2, 6, 6)
