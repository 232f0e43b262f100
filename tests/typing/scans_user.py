"""A user's script on the scans, the convolution before them and their matrices, for type checkers alone."""

from typing import Literal, assert_type

from torch import Tensor

from nondual.ops.causal_conv1d import causal_conv1d
from nondual.ops.linear_recurrence import associative_scan, combine, linear_recurrence
from nondual.ops.selective_scan import selective_scan, selective_scan_matrix, selective_scan_step
from nondual.ops.ssd import ssd, ssd_matrix, ssd_step


def recurrence(a: Tensor, b: Tensor, engine: Literal["sequential", "parallel"]) -> None:
    h, last = linear_recurrence(a, b, impl="parallel")
    assert_type(h, Tensor)
    assert_type(last, Tensor)
    assert_type(linear_recurrence(a, b, last, impl=engine), tuple[Tensor, Tensor])
    assert_type(combine((a, b), (a, b)), tuple[Tensor, Tensor])
    assert_type(associative_scan((a, b)), tuple[Tensor, Tensor])


def scan(u: Tensor, A: Tensor, B: Tensor, reset: Tensor | None, softplus: bool) -> None:
    y, state = selective_scan(u, u, A, B, B, None, u, None, softplus, reset=reset, discretization="zoh")
    assert_type(y, Tensor)
    assert_type(selective_scan_step(u[:, 0], u[:, 0], A, B[:, 0], B[:, 0], state=state), tuple[Tensor, Tensor])
    assert_type(selective_scan(u, u, A, B, B, state=state, impl="reference"), tuple[Tensor, Tensor])
    assert_type(selective_scan_matrix(u, A, B, B, reset=reset), Tensor)


def duality(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, chunk: int | None) -> None:
    y, state = ssd(x, delta, A, B, B, delta_softplus=True, chunk=chunk, impl="auto")
    assert_type(y, Tensor)
    assert_type(ssd(x, delta, A, B, B, state=state, impl="triton"), tuple[Tensor, Tensor])
    assert_type(ssd_step(x[:, 0], delta[:, 0], A, B[:, 0], B[:, 0], state=state), tuple[Tensor, Tensor])
    assert_type(ssd_matrix(delta, A, B, B), Tensor)


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    y, history = causal_conv1d(x, weight, bias)
    assert_type(y, Tensor)
    assert_type(causal_conv1d(x, weight, bias, history, reset=None), tuple[Tensor, Tensor])
