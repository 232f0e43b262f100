"""Gates, step lengths and scores far out, in every engine of every scan, forward and backward.

Where exp(-z) overflows or vanishes the gate is z or 0, and its gradient 1 or 0: a finite number times 0, never inf
times 0. The judge is the reference in float64.
"""

import pytest
import torch

from nondual.ops.attention import masked_softmax
from nondual.ops.selective_scan import selective_scan, selective_scan_step
from nondual.ops.ssd import ssd, ssd_step

GATES = [0.0, 20.0, 88.0, 89.0, 104.0, 200.0, 1e4]  # exp(88) is a float32, exp(89) is none
SCANS = {
    "selective_scan": (selective_scan, ["reference", "cpu", "triton"]),
    "ssd": (ssd, ["reference", "chunked", "triton"]),
}


def made(name: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A sequence of which every step has another gate, on both sides of 0; delta reaches from -200 to 200."""
    torch.manual_seed(1)
    z = torch.tensor(GATES + [-x for x in GATES])
    z = (z if dtype == torch.float32 else z.clamp(-200, 200))[None, :, None]  # float16 ends at 65,504
    length = z.shape[1]
    steps = torch.tensor([-200.0, -30.0, -1.0, 0.5, 2.0, 19.0, 21.0, 200.0, -2.0, 0.0, 1.0, -104.0, 3.0, 1.0])
    if name == "ssd":
        z, heads = z[..., None].expand(1, length, 2, 3), 2
        given = {"x": torch.randn(z.shape), "delta": steps[None, :, None].expand(1, length, heads)}
        given |= {"A": -torch.rand(heads) - 0.5, "D": torch.randn(heads)}
        given |= {name: torch.randn(1, length, 1, 4) for name in "BC"}
    else:
        z = z.expand(1, length, 3)
        given = {"u": torch.randn(z.shape), "delta": steps[None, :, None].expand(z.shape)}
        given |= {"A": -torch.rand(3, 4) - 0.5, "D": torch.randn(3)}
        given |= {name: torch.randn(1, length, 4) for name in "BC"}
    given |= {"z": z}
    timed = ("x", "u", "delta", "B", "C", "z")
    return {name: x.to(dtype if name in timed else torch.float32).clone() for name, x in given.items()}


def run(operation, given, **options):
    """Outputs and gradients by name, in float64."""
    given = {name: x.clone().requires_grad_() for name, x in given.items()}
    y, last = operation(**given, delta_softplus=True, **options)
    weights = torch.linspace(-1, 1, y.numel()).view(y.shape)
    ((y.double() * weights).sum() + last.double().sum()).backward()
    return {"y": y.detach(), "last": last.detach()} | {f"gradient of {name}": x.grad for name, x in given.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name, impl", [(name, impl) for name, (_, engines) in SCANS.items() for impl in engines])
def test_gates_and_step_lengths_far_out(name, impl, dtype):
    operation, given = SCANS[name][0], made(name, dtype)
    exact = run(operation, {name: x.double() for name, x in given.items()}, impl="reference")
    plain = run(operation, given, impl="reference")
    for what, found in run(operation, given, impl=impl).items():
        assert found.isfinite().all(), what
        error, allowed = ((x[what].double() - exact[what]).abs().max() for x in ({what: found}, plain))
        kind = dtype if impl == "triton" else found.dtype  # its products are of the inputs' precision
        unit = torch.finfo(kind).eps * exact[what].abs().max()
        assert error <= 3 * allowed + 4 * unit, (what, error, allowed, unit)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", SCANS)
def test_gates_far_out_in_one_step(name, sign):
    step = {"selective_scan": selective_scan_step, "ssd": ssd_step}[name]
    given = made(name, torch.float32)
    for t, gate in enumerate(GATES):
        at = t if sign > 0 else len(GATES) + t
        one = {k: x[:, at] if k in ("x", "u", "delta", "B", "C", "z") else x for k, x in given.items()}
        y, _ = step(**one, delta_softplus=True)
        bare, _ = step(**{k: x for k, x in one.items() if k != "z"}, delta_softplus=True)
        z = torch.tensor(sign * gate, dtype=torch.float64)
        torch.testing.assert_close(y.double(), bare.double() * z * z.sigmoid(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_softmax_over_many_equal_and_over_far_scores(dtype):
    """70,000 equal scores share 1, in half precision too; scores of ±1e4 leave the highest alone."""
    many = masked_softmax(torch.zeros(1, 70_000, dtype=dtype))
    torch.testing.assert_close(many.double().sum(), torch.tensor(1.0, dtype=torch.float64), rtol=2e-2, atol=0)
    far = torch.tensor([[1e4, -1e4, 1e4, -torch.inf]], dtype=dtype, requires_grad=True)
    weights = masked_softmax(far)
    assert weights.tolist() == [[0.5, 0.0, 0.5, 0.0]]
    (gradient,) = torch.autograd.grad(weights[0, 0], far)
    assert gradient.tolist() == [[0.25, 0.0, -0.25, 0.0]]


@pytest.mark.parametrize("name", ["B", "C"])
def test_a_sum_over_channels_is_infinite_and_not_nan(name):
    """B or C infinite at one step, everything else positive: the C loop works on more channels at a time than there
    are, and 0 times infinity of those that are not there may not join the sums of dB and dC."""

    def kinds(impl):
        torch.manual_seed(0)
        given = {key: torch.rand(1, 9, 3) + 0.1 for key in ("u", "delta")} | {"A": -torch.rand(3, 16) - 0.1}
        given |= {key: torch.rand(1, 9, 16) + 0.1 for key in "BC"}
        given[name][0, 4, 2] = torch.inf
        given = {key: x.requires_grad_() for key, x in given.items()}
        y, last = selective_scan(**given, impl=impl)
        gradients = torch.autograd.grad((y, last), list(given.values()), [torch.ones_like(y), torch.ones_like(last)])
        named = zip(("y", "last", *given), (y, last, *gradients))
        return {key: (x == torch.inf) * 1 + (x == -torch.inf) * 2 + x.isnan() * 3 for key, x in named}

    found = kinds("cpu")
    for key, expected in kinds("reference").items():
        assert torch.equal(found[key], expected), key


@pytest.mark.parametrize("name, impl", [(name, impl) for name, (_, engines) in SCANS.items() for impl in engines])
def test_a_state_decays_by_what_it_should_however_fast(name, impl):
    """Without input, a state of 1 is exp(ΔA) after a step: to the last places of float32 down to exp(-80)."""
    logs = torch.tensor([-0.1, -9.0, -11.0, -16.0, -30.0, -80.0])  # one step each, of its own channel or head
    delta, zero = -logs.expand(1, 1, 6), torch.zeros(1, 1, 6)
    if name == "ssd":
        one, rest = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
        state = torch.ones(1, 6, 1, 1)
        y, last = ssd(zero[..., None], delta, -torch.ones(6), rest, one, state=state, impl=impl)
    else:
        one, rest = torch.ones(1, 1, 1), torch.zeros(1, 1, 1)
        y, last = selective_scan(zero, delta, -torch.ones(6, 1), rest, one, state=torch.ones(1, 6, 1), impl=impl)
    for found in (y, last):
        torch.testing.assert_close(found.flatten().double(), logs.double().exp(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("softplus", [False, True])
def test_a_nan_with_digits_of_its_own_is_still_a_nan(softplus):
    """The C loop adds an exponent to a number's bits, which can make a number of a NaN that has others than torch.nan:
    its chunk must take the way that looks."""
    torch.manual_seed(0)
    u, delta, B = torch.randn(1, 9, 3), torch.rand(1, 9, 3), torch.randn(1, 9, 16)
    delta[0, 4, 1] = torch.tensor(0x7FC00001, dtype=torch.int32).view(torch.float32)
    y, last = selective_scan(u, delta, -torch.rand(3, 16), B, B, delta_softplus=softplus, impl="cpu")
    assert y[0, 4:, 1].isnan().all() and last[0, 1].isnan().all()
    assert y[..., [0, 2]].isfinite().all() and y[0, :4].isfinite().all() and last[:, [0, 2]].isfinite().all()
