"""Scans on one device and over ranks, on the same numbers: what the tests of their parts share."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch._dynamo  # here, before ranks are forked: the first call of a custom operator imports it, for seconds

from nondual.ops.linear_attention import linear_attention
from nondual.ops.selective_scan import selective_scan
from nondual.ops.ssd import ssd
from nondual.parallel.scan import parallel_linear_attention, parallel_selective_scan, parallel_ssd

B, H, G, P, N, D, DV = 2, 6, 3, 5, 7, 5, 3


class Case(NamedTuple):
    """One call: on one device and over ranks, its tensors by name, its options, and which dimension of each is time."""

    one: Callable[..., Any]
    many: Callable[..., Any]
    tensors: dict[str, torch.Tensor]
    options: dict[str, Any]
    time: dict[str, int]

    def part(self, start, stop):
        """The tensors of the steps from start to stop."""
        return {
            name: x.narrow(self.time[name], start, stop - start) if name in self.time else x
            for name, x in self.tensors.items()
        }


def resets(length):
    """A few beginnings, neighbours and the last step among them, other ones in each row of the batch; the first row has
    none in the first third."""
    marks = torch.rand(B, length, generator=torch.Generator().manual_seed(3)) < 0.1
    marks[0, : length // 3] = False
    marks[1, length // 2 : length // 2 + 2] = True
    marks[-1, -1:] = True
    return marks


def cases(length, dtype=torch.float64):
    """By name, every kind of transition and every option, with and without resets."""
    draw = torch.Generator().manual_seed(length)

    def randn(*shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)

    def rate(*shape):
        return -torch.rand(shape, generator=draw, dtype=torch.float64).to(dtype)

    selective = {
        "u": randn(B, length, H), "delta": randn(B, length, H), "A": 2 * rate(H, N), "B": randn(B, length, G, N),
        "C": randn(B, length, G, N), "D": randn(H), "z": randn(B, length, H), "delta_bias": randn(H),
        "state": randn(B, H, N), "reset": resets(length),
    }  # fmt: skip
    bare = {name: selective[name] for name in ("u", "A")} | {
        "delta": selective["delta"].abs(), "B": randn(H, N), "C": randn(B, length, N),
    }  # fmt: skip
    dual = {
        "x": randn(B, length, H, P), "delta": randn(B, length, H), "A": rate(H), "B": randn(B, length, G, N),
        "C": randn(B, length, G, N), "D": randn(H, P), "z": randn(B, length, H, P), "delta_bias": randn(H),
        "state": randn(B, H, P, N), "reset": resets(length),
    }  # fmt: skip
    growing = dual | {"A": -dual["A"] / 4, "delta": dual["delta"].abs()}
    del growing["reset"], growing["delta_bias"], growing["z"], growing["D"]
    qkv = {"q": randn(B, H, length, D), "k": randn(B, G, length, D), "v": randn(B, G, length, DV)}
    state, reset = {"state": randn(B, H, D, DV)}, {"reset": resets(length)}
    unit = qkv | {"k": torch.nn.functional.normalize(qkv["k"], dim=-1)}
    beta = {"beta": 2 * torch.rand(B, H, length, generator=draw, dtype=torch.float64).to(dtype)}
    plus = {name: x.exp() if name != "v" else x for name, x in qkv.items()}
    softplus = {"delta_softplus": True}
    each_step, each_channel = ({"log_decay": rate(*shape)} for shape in ((B, H, length), (B, H, length, D)))
    given = {
        "selective scan": (selective, softplus),
        "selective scan, constant B": (bare, {"discretization": "zoh"}),
        "ssd": (dual, softplus),
        "ssd, growing": (growing, {"chunk": 2}),
        "linear": (qkv | state, {}),
        "linear, resets": (qkv | reset, {"scale": 0.5}),
        "linear, heads": (qkv | state | reset | {"log_decay": rate(H)}, {}),
        "linear, steps, normalised": (
            plus | each_step | reset | {"state": randn(B, H, D, DV + 1)},
            {"normalise": True},
        ),
        "linear, channels": (qkv | each_channel | state | reset, {}),
        "delta": (unit | beta | state, {}),
        "gated delta": (unit | beta | each_step | state | reset, {"chunk": 4}),
    }
    return {name: _case(name, tensors, options) for name, (tensors, options) in given.items()}


def _case(name, tensors, options):
    timed = {"k", "v", "q", "beta", "log_decay", "reset", "u", "x", "delta", "z", "B", "C"}
    time = {
        n: 2 if name.startswith(("linear", "delta", "gated")) and n != "reset" else 1
        for n, x in tensors.items()
        if n in timed and (x.ndim > 2 or n == "reset")
    }
    one = selective_scan if name.startswith("selective") else ssd if name.startswith("ssd") else linear_attention
    return Case(one, MANY[one], tensors, options, time)


MANY = {selective_scan: parallel_selective_scan, ssd: parallel_ssd, linear_attention: parallel_linear_attention}
