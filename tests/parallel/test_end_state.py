"""What a part of a sequence makes of the state before it: the last state of the operation, from any first one."""

import pytest
import torch
from time_cases import cases

from nondual.ops import linear_attention, selective_scan, ssd
from nondual.parallel.end_state import of_linear_attention, of_selective_scan, of_ssd, without_steps
from nondual.parallel.passed_on import act

KINDS = list(cases(1))


def end_state(case, tensors):
    """S, D, and how D acts on a state."""
    if case.one is selective_scan.selective_scan:
        given = selective_scan.checked(**tensors, **case.options)
        return of_selective_scan(given, "auto"), torch.mul
    if case.one is ssd.ssd:
        return of_ssd(ssd.checked(**tensors, **case.options)), torch.mul
    given = linear_attention.checked(**tensors, **case.options)
    return of_linear_attention(given), torch.matmul if "beta" in tensors else torch.mul


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [0, 1, 13])
def test_the_last_state_is_the_first_decayed_and_what_was_added(kind, length):
    case = cases(length)[kind]
    tensors = {n: x.clone().requires_grad_(x.is_floating_point()) for n, x in case.tensors.items() if n != "C"}
    tensors |= {"C": case.tensors["C"]} if "C" in case.tensors else {}
    shape = case.one(**tensors, **case.options)[1].shape
    first = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    leaves = [x for name, x in tensors.items() if x.requires_grad and name not in ("state", "D", "z", "q")] + [first]
    _, expected = case.one(**{**tensors, "state": first}, **case.options)
    (added, decay), product = end_state(case, tensors)
    got = act(product, decay, first) + added
    assert got.dtype == expected.dtype and got.shape == expected.shape == added.shape
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    ways = [
        torch.autograd.grad((x * x).sum(), leaves, allow_unused=True, materialize_grads=True) for x in (got, expected)
    ]
    for one, two in zip(*ways):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_happens_in_no_steps(kind):
    case = cases(13)[kind]
    tensors = dict(case.tensors)
    if case.one is ssd.ssd:
        end = of_ssd(without_steps(ssd.checked(**tensors, **case.options)))
    elif case.one is selective_scan.selective_scan:
        end = of_selective_scan(without_steps(selective_scan.checked(**tensors, **case.options)), "auto")
    else:
        end = of_linear_attention(without_steps(linear_attention.checked(**tensors, **case.options)))
    whole, _ = end_state(case, tensors)
    assert end.added.shape == whole.added.shape and end.decay.shape == whole.decay.shape
    assert not end.added.any()
    still = torch.eye(end.decay.shape[-1]).double() if "beta" in tensors else torch.ones(()).double()
    assert torch.equal(end.decay, still.expand(end.decay.shape))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "reset" in cases(1)[kind].tensors])
def test_a_nan_before_a_reset_is_forgotten_and_leaves_other_gradients_alone(kind):
    """In every tensor of one step in turn; row 1 of the batch has a reset at steps 6, 7 and 12."""
    case = cases(13)[kind]
    for name, dim in case.time.items():
        if name in ("reset", "C", "z", "q"):
            continue
        tensors = {n: x.clone() for n, x in case.tensors.items()}
        tensors[name].select(dim, 4)[1] = float("nan")
        leaves = {n: x.requires_grad_() for n, x in tensors.items() if n in case.time and x.is_floating_point()}
        (added, decay), _ = end_state(case, tensors)
        assert added[1].isfinite().all() and not decay[1].detach().any()
        loss = (added[1] ** 2).sum() + 3 * decay.sum()
        grads = torch.autograd.grad(loss, leaves.values(), allow_unused=True, materialize_grads=True)
        for n, grad in zip(leaves, grads):
            assert grad[1].narrow(case.time[n] - 1, 7, 6).isfinite().all(), (name, n)


def test_small_decays_beside_large_ones_are_kept():
    """Steps that forget everything beside steps that forget nothing, in float32: as exact as in float64."""
    case = cases(101)["ssd"]
    tensors = {name: x for name, x in case.tensors.items() if name != "reset"}
    tensors["delta"] = tensors["delta"].clone()
    tensors["delta"][:, ::17] += 300
    tensors["delta"][:, 1::17] -= 9
    narrow = {name: x.float() for name, x in tensors.items()}
    (added, decay), _ = end_state(case, narrow)
    (exact, _), _ = end_state(case, {name: x.double() for name, x in narrow.items()})
    assert added.dtype == decay.dtype == torch.float32
    torch.testing.assert_close(added.double(), exact, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_summed_in_float32(kind, dtype):
    case = cases(13, dtype)[kind]
    end, _ = end_state(case, case.tensors)
    assert end.added.dtype == end.decay.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        again, _ = end_state(case, case.tensors)
    assert again.added.dtype == torch.float32
    if dtype == torch.bfloat16:
        torch.testing.assert_close(again.added, end.added)
