"""A user's script on Mamba, its neighbours and the language model, for type checkers alone."""

from functools import partial
from typing import assert_type

import torch
from torch import Tensor

from nondual.efficient_attention.hippo import legs, legs_states, legt_states, project, reconstruct
from nondual.efficient_attention.mamba import Mamba, MambaCache
from nondual.efficient_attention.mamba2 import Mamba2
from nondual.efficient_attention.s4d import S4D, chunked, convolution, recurrence, s4d_inv, scan
from nondual.efficient_attention.state_space import discretize, run
from nondual.language_models.causal import CausalLM
from nondual.language_models.gpt import GPT
from nondual.language_models.hybrid import HybridLM
from nondual.language_models.mamba import MambaLM, choose
from nondual.tasks import relation, selective_copying
from nondual.transformer import MixerBlock


def mixers(x: Tensor, reset: Tensor) -> None:
    for mixer in (Mamba(64, d_state=8, impl="reference"), Mamba2(64, d_head=16, impl="chunked", dt_limit=(0.001, 0.1))):
        cache = mixer.new_cache(2)
        assert_type(cache, MambaCache)
        assert_type(mixer(x, cache=cache, reset=reset), Tensor)
        assert_type(mixer.step(x[:, 0], cache), Tensor)
        assert_type((cache.conv, cache.state), tuple[Tensor, Tensor])
        cache.reset()
    delta, B, C = Mamba(64).select(x)
    assert_type(delta + (B * C).sum(), Tensor)


def state_spaces(u: Tensor, flag: bool) -> None:
    for op in (chunked, convolution, scan, recurrence):
        layer = S4D(3, 16, init=s4d_inv, rule="bilinear", op=op)
        assert_type(layer(u), Tensor)
        assert_type(layer(u, return_state=False), Tensor)
        assert_type(layer(u, return_state=True), tuple[Tensor, Tensor])
        assert_type(layer(u, return_state=flag), Tensor | tuple[Tensor, Tensor])
        y, state = layer.step(u[:, 0])
        assert_type(layer.forward(y[:, None], state, return_state=True), tuple[Tensor, Tensor])
    A, B = legs(8)
    assert_type(run(u, *discretize(0.1, A, B, "euler")), tuple[Tensor, Tensor])
    assert_type(reconstruct(legt_states(u[..., 0], 8, 20.0), torch.linspace(0, 1, 5)), Tensor)
    assert_type(legs_states(u[..., 0], 8)[:, -1] - project(u[..., 0], 8), Tensor)


def language_model(ids: Tensor) -> None:
    model = MambaLM(256, 64, 2, mixer=partial(Mamba2, d_head=16), tied=False)
    cache = model.new_cache(2)
    assert_type(cache, list[MambaCache])
    assert_type(model(ids, cache=cache), Tensor)
    assert_type(model.loss(ids, reset=ids == 0), Tensor)
    assert_type(model.generate(ids, 5, temperature=1.0, top_k=3, eos=0), Tensor)
    assert_type(choose(model(ids)[:, -1], 0.8, None), Tensor)
    for other in (
        GPT(256, 64, 2, 4, max_len=32),
        HybridLM(256, 64, 3, 4),
        CausalLM(256, 64, 2, layer=lambda i: MixerBlock(Mamba(64), 64)),
    ):
        assert_type(other(ids, cache=other.new_cache(2, 32), reset=ids == 0), Tensor)
        assert_type(other.loss(ids), Tensor)
        assert_type(other.generate(ids, 5, temperature=1.0, top_p=0.9, cached=False), Tensor)
    assert_type(relation((1, 2, 0), 4), tuple[Tensor, Tensor, Tensor])
    assert_type(selective_copying(4, 20, tokens=3), tuple[Tensor, Tensor])
