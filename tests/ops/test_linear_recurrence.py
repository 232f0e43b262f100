"""The linear recurrence: both engines against each other and against its formula, forward, backward and twice."""

import math

import pytest
import torch
from harness import DRAWS, ErrorBudget
from recurrence_cases import ENGINES, KINDS, LENGTHS, arguments, by_matrix, draw

from nondual.ops.linear_recurrence import FEW, associative_scan, combine, linear_recurrence, parallel, sequential

# --- values --------------------------------------------------------------------------------------------------------


def test_three_steps_by_hand():
    """h_0 = 1: 2·1 + 1 = 3, 3·3 + 1 = 10, 0·10 + 5 = 5."""
    a, b = torch.tensor([[2.0, 3.0, 0.0]]), torch.tensor([[1.0, 1.0, 5.0]])
    for impl in ENGINES:
        h, last = linear_recurrence(a, b, torch.ones(1), impl=impl)
        assert h.tolist() == [[3.0, 10.0, 5.0]] and last.tolist() == [5.0]


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("length", [1, 2, 3, 8, 17])
@pytest.mark.parametrize("impl", ENGINES)
def test_equals_the_sum_of_products(impl, length, dtype):
    a, b, state = arguments(length, dtype)
    h, last = linear_recurrence(a, b, state, impl=impl)
    torch.testing.assert_close(h, by_matrix(a, b, state))
    torch.testing.assert_close(last, h[:, -1])


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("length", LENGTHS)
def test_the_engines_agree_forward_and_backward(length, dtype):
    outs = []
    for impl in ENGINES:
        leaves = [x.requires_grad_() for x in arguments(length, dtype)]
        h, last = linear_recurrence(*leaves, impl=impl)
        weights = draw(*h.shape, dtype=dtype, seed=4)
        ((h * weights).real.sum() + (3 * last).real.sum()).backward()
        outs.append([h, last, *(x.grad for x in leaves if x.grad is not None)])
    torch.testing.assert_close(*outs)


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("impl", ENGINES)
def test_gradients_to_the_second_order(impl, dtype):
    leaves = [x.requires_grad_() for x in arguments(5, dtype, width=(2,))]
    assert torch.autograd.gradcheck(lambda *x: linear_recurrence(*x, impl=impl), leaves)
    assert torch.autograd.gradgradcheck(lambda *x: linear_recurrence(*x, impl=impl), leaves)


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("shape", [(1, 1, 3), (2, 1, 3), (1, 5, 1), (1, 1, 1)])
def test_a_factor_of_size_one_stands_for_all(shape, impl):
    _, b, state = arguments(5, width=(3,))
    a = draw(*shape).sigmoid().requires_grad_()
    torch.testing.assert_close(
        linear_recurrence(a, b, state, impl=impl), linear_recurrence(a.expand(b.shape), b, state, impl=impl)
    )
    assert torch.autograd.gradcheck(lambda a: linear_recurrence(a, b, state, impl=impl), [a])


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("cut", [0, 1, 7, 16, 17])
def test_splitting_a_sequence_changes_nothing(cut, impl):
    a, b, state = arguments(17)
    first, carried = linear_recurrence(a[:, :cut], b[:, :cut], state, impl=impl)
    second, last = linear_recurrence(a[:, cut:], b[:, cut:], carried, impl=impl)
    torch.testing.assert_close((torch.cat([first, second], 1), last), linear_recurrence(a, b, state, impl=impl))


@pytest.mark.parametrize("impl", ENGINES)
def test_a_zero_factor_forgets(impl):
    a, b, _ = arguments(9)
    a[:, 4] = 0
    h, _ = linear_recurrence(a, b, impl=impl)
    torch.testing.assert_close(h[:, 4:], linear_recurrence(a[:, 4:], b[:, 4:], impl=impl)[0])


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("layout", ["transposed", "expanded", "sliced"])
@pytest.mark.parametrize("name", ["a", "b", "state", "d_h"])
def test_one_argument_laid_out_otherwise(name, layout, impl):
    """The others stay as they are, so that strides taken from the wrong one are seen."""
    a, b, state = arguments(11, width=(3, 2))
    given = {"a": a, "b": b, "state": state, "d_h": draw(*b.shape, seed=5)}

    def laid(x):
        if layout == "transposed":
            return x.mT.contiguous().mT
        if layout == "sliced":
            return torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]
        return x[..., :1].expand(x.shape)

    changed = laid(given[name])
    results = []
    for x in (changed, changed.clone(memory_format=torch.contiguous_format)):
        *leaves, d_h = (given | {name: x}).values()
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        h, last = linear_recurrence(*leaves, impl=impl)
        results.append([h, last, *torch.autograd.grad((h, last), leaves, (d_h, d_h[:, 0]))])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("layout", ["transposed", "expanded", "sliced"])
def test_layouts_of_inputs_and_of_the_gradient(layout, impl):
    """A view gives what its copy gives, and so does a gradient that comes in as a view."""
    base = draw(3, 11, 2)
    a = {"transposed": base.transpose(0, 1), "expanded": base[:1, :, :].transpose(0, 1).expand(11, 3, 2)}.get(layout)
    a = (draw(11, 6, 4)[:, ::2, ::2] if a is None else a) * 0.5
    b = draw(3, 11, 2, seed=1).transpose(0, 1)
    for grad in (torch.ones(()).double().expand(11, 3, 2), draw(3, 11, 2, seed=2).transpose(0, 1)):
        ours, copies = a.detach().requires_grad_(), a.detach().clone().contiguous().requires_grad_()
        h, again = linear_recurrence(ours, b, impl=impl)[0], linear_recurrence(copies, b.contiguous(), impl=impl)[0]
        h.backward(grad)
        again.backward(grad.contiguous())
        torch.testing.assert_close((h, ours.grad), (again, copies.grad))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("impl", ["auto", *ENGINES])
def test_a_gpu_gives_what_a_cpu_gives(impl, dtype):
    outs = []
    for device in ("cpu", "cuda"):
        leaves = [x.to(device).requires_grad_() for x in arguments(111, dtype)]
        h, last = linear_recurrence(*leaves, impl=impl)
        (h.abs().square().sum() + last.real.sum()).backward()
        outs.append([x.cpu() for x in (h, last, *(leaf.grad for leaf in leaves))])
    torch.testing.assert_close(*outs)


# --- precision -----------------------------------------------------------------------------------------------------


def plain(a, b, state):
    """The formula in plain PyTorch, in the inputs' own dtype: what the engines are measured by."""
    h, states = state, []
    for t in range(b.shape[1]):
        h = a[:, t] * h + b[:, t]
        states.append(h)
    return torch.stack(states, 1)


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.complex64])
def test_no_less_exact_than_the_formula(dtype, impl):
    """Error against float64 at most twice that of plain PyTorch in the same dtype, gradients three times; and half a
    unit in the last place of the largest number."""
    exact_dtype = torch.complex128 if dtype.is_complex else torch.float64

    def run(f, dtype, leaves, grad):
        x = [leaf.to(dtype, copy=True).requires_grad_() for leaf in leaves]
        h = f(*x)
        h.backward(grad.to(dtype))
        return [h.detach(), *(y.grad for y in x)]

    budget = ErrorBudget()
    for seed in range(DRAWS):
        leaves = [x.roll(seed, 1 if x.ndim > 3 else -1).to(dtype) for x in arguments(257, exact_dtype)]  # rounded once
        leaves[1] = draw(*leaves[1].shape, dtype=exact_dtype, seed=10 + seed).to(dtype)
        grad = draw(*leaves[1].shape, dtype=exact_dtype, seed=20 + seed).to(dtype)
        ours = run(lambda *x: linear_recurrence(*x, impl=impl)[0], dtype, leaves, grad)
        theirs, exact = run(plain, dtype, leaves, grad), run(plain, exact_dtype, leaves, grad)
        for name, x, y, z in zip(("h", "d_a", "d_b", "d_state"), ours, theirs, exact):
            assert x.dtype == dtype
            budget.add(name, ours=x, plain=y, exact=z)
    budget.check({"h": 2}, otherwise=3, ulps=0.5)


@pytest.mark.parametrize("impl", ENGINES)
def test_half_precision_carries_its_state_in_float32(impl):
    a, b, state = (x.to(torch.bfloat16) for x in arguments(9))
    h, last = linear_recurrence(a, b, state, impl=impl)
    assert h.dtype == torch.bfloat16 and last.dtype == torch.float32
    _, carried = linear_recurrence(a[:, :5], b[:, :5], state, impl=impl)
    again = linear_recurrence(a[:, 5:], b[:, 5:], carried, impl=impl)
    torch.testing.assert_close(again, (h[:, 5:], last))


# --- the scan ------------------------------------------------------------------------------------------------------


def test_combine_is_two_steps_made_one():
    first, second = ((draw(7), draw(7, seed=1)), (draw(7, seed=2), draw(7, seed=3)))
    h = draw(7, seed=4)
    a, b = combine(first, second)
    torch.testing.assert_close(a * h + b, second[0] * (first[0] * h + first[1]) + second[1])


def test_combine_is_associative_and_not_commutative():
    """Exactly: on whole numbers no rounding hides a difference, and degree 2 in each is met by more than 3 values."""
    values = torch.arange(-3.0, 4.0, dtype=torch.float64)
    x, y, z = (pair.unbind(-1) for pair in torch.cartesian_prod(*[values] * 6).view(-1, 3, 2).unbind(1))
    for left, right in zip(combine(combine(x, y), z), combine(x, combine(y, z))):
        assert torch.equal(left, right)
    assert not torch.equal(combine(x, y)[1], combine(y, x)[1])
    one = (torch.ones(()).double(), torch.zeros(()).double())  # and it has a unit: the step that does nothing
    assert all(torch.equal(a, b) for a, b in zip(combine(one, x), x))
    assert all(torch.equal(a, b) for a, b in zip(combine(x, one), x))


@pytest.mark.parametrize("length", [0, 1, 2, 3, 5, 64, 100, 1025])
def test_the_scan_takes_few_rounds_and_little_work(length, monkeypatch):
    """At most 2 log₂ L rounds, and fewer than 2 L combinations: that is what it is for."""
    from nondual.ops import linear_recurrence as module

    rounds = []
    monkeypatch.setattr(module, "combine", lambda x, y: rounds.append(y[1].shape[1]) or combine(x, y))
    a, b = torch.full((1, length), 0.5).double(), torch.ones(1, length).double()
    products, states = associative_scan((a, b))
    t = torch.arange(1, length + 1).double()
    torch.testing.assert_close(products[0], 0.5**t)
    torch.testing.assert_close(states[0], 2 - 2 * 0.5**t)
    assert len(rounds) <= 2 * math.ceil(math.log2(length)) if length > 1 else not rounds
    assert sum(rounds) <= 2 * length


@pytest.mark.parametrize("engine", [sequential, parallel])
def test_memory_grows_with_length_alone(engine, largest):
    """No tensor is longer than the recurrence itself (the scan stacks even and odd places: as long), by an engine alone
    nor in both passes of the operator."""
    a, b, state = (x.requires_grad_() for x in arguments(64))
    assert largest(lambda: engine(a.detach(), b.detach(), state.detach())) <= b.numel()
    whole = lambda: linear_recurrence(a, b, state, impl=engine.__name__)[0].sum().backward()  # noqa: E731
    assert largest(whole) <= b.numel()


# --- memory of its own -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 9])
@pytest.mark.parametrize("impl", ENGINES)
def test_the_last_state_shares_memory_with_nothing(impl, length):
    a, b, state = arguments(length)
    h, last = linear_recurrence(a, b, state, impl=impl)
    assert last.untyped_storage().nbytes() == last.nbytes
    storages = {x.untyped_storage().data_ptr() for x in (h, a, b, state)}
    assert last.untyped_storage().data_ptr() not in storages
    kept, given = last.clone(), state.clone()
    h.zero_()
    assert torch.equal(last, kept)
    last.zero_()
    assert torch.equal(state, given)


# --- the door ------------------------------------------------------------------------------------------------------


def test_auto_takes_the_scan_where_a_step_is_small(monkeypatch):
    from nondual.ops import linear_recurrence as module

    taken = []
    for name in ENGINES:
        engine = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *x, name=name, engine=engine: taken.append(name) or engine(*x))
    for width, dtype in ((FEW, torch.float32), (FEW + 1, torch.float32), (FEW, torch.complex64)):
        linear_recurrence(torch.ones(1, 3, 1), torch.ones(1, 3, width, dtype=dtype))
    assert taken == ["parallel", "sequential", "sequential"]


@pytest.mark.parametrize("impl", ["auto", *ENGINES])
def test_nothing_to_do(impl):
    state = draw(2, 3)
    h, last = linear_recurrence(draw(2, 0, 3), draw(2, 0, 3), state, impl=impl)
    assert h.shape == (2, 0, 3) and torch.equal(last, state)
    h, last = linear_recurrence(draw(0, 5, 3), draw(0, 5, 3), impl=impl)
    assert h.shape == (0, 5, 3) and last.shape == (0, 3)


def test_real_and_complex_meet():
    a, b = torch.tensor([[0.5, 0.5]]), torch.tensor([[1j, 1.0]])
    h, last = linear_recurrence(a, b, torch.tensor([2.0]))
    assert h.dtype == last.dtype == torch.complex64 and h.tolist() == [[1 + 1j, 1.5 + 0.5j]]


@pytest.mark.parametrize(
    "change, says",
    [
        ({"a": torch.ones(2, 4, 3)}, r"a must have the shape of b, \(2, 5, 3\), or 1 in its place, got \(2, 4, 3\)"),
        ({"a": torch.ones(5, 3)}, r"a must have the shape of b"),
        ({"b": torch.ones(5)}, r"b must be \(B, L, …\), got \(5,\)"),
        ({"b": torch.ones(2, 5, 3, dtype=torch.long)}, "b must be floating point or complex, got torch.int64"),
        ({"a": torch.ones(2, 5, 3, dtype=torch.bool)}, "a must be floating point or complex, got torch.bool"),
        ({"state": torch.ones(2, 4)}, r"state must be \(B, …\) = \(2, 3\), b without its time, got \(2, 4\)"),
        ({"a": torch.ones(2, 5, 3, device="meta")}, "a must be on the device of b, cpu, got meta"),
        ({"impl": "triton"}, r"impl must be one of \['auto', 'sequential', 'parallel'\], got 'triton'"),
    ],
)
def test_what_does_not_fit_is_named(change, says):
    with pytest.raises(ValueError, match=says):
        linear_recurrence(**({"a": torch.ones(2, 5, 3), "b": torch.ones(2, 5, 3)} | change))


@pytest.mark.parametrize("name", ["a", "b", "state"])
def test_what_is_not_a_tensor_is_named(name):
    given = {"a": torch.ones(2, 5, 3), "b": torch.ones(2, 5, 3), "state": torch.ones(2, 3)}
    with pytest.raises(TypeError, match=f"{name} must be a Tensor, got ndarray; use torch.from_numpy"):
        linear_recurrence(**given | {name: given[name].numpy()})
    with pytest.raises(TypeError, match=f"{name} must be a Tensor, got list"):
        linear_recurrence(**given | {name: given[name].tolist()})


def test_an_unknown_engine_is_named_for_an_empty_sequence_too():
    with pytest.raises(ValueError, match="impl must be one of"):
        linear_recurrence(torch.ones(2, 0), torch.ones(2, 0), impl="fast")
