"""Mamba, Mamba-2 and the language model as torch modules: adapters, hooks, caches, compilation, transforms, engines."""

import copy
import pickle
import re
import warnings
from functools import partial

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch.nn.utils import parametrize

from nondual.efficient_attention import mamba as mamba_file
from nondual.efficient_attention import mamba2 as mamba2_file
from nondual.efficient_attention.mamba import Mamba, MambaCache
from nondual.efficient_attention.mamba2 import Mamba2
from nondual.language_models.mamba import MambaBlock, MambaLM

B, N, E, V = 2, 9, 8, 13
MIXERS = {
    "mamba": partial(Mamba, E, d_state=5, dt_rank=2),
    "mamba2": partial(Mamba2, E, d_state=5, d_head=4, n_groups=2, chunk=4),
}
MODELS = {
    **MIXERS,
    "tied": partial(MambaLM, V, E, 2, mixer=partial(Mamba, d_state=5)),
    "untied": partial(MambaLM, V, E, 2, mixer=partial(Mamba2, d_state=5, d_head=4), tied=False),
}


def make(kind, models=MODELS, **more):
    """A module of random weights, none of them small: what is not heard would show."""
    torch.manual_seed(0)
    made = models[kind](**more)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if name.endswith(("weight", "D")):
                p.copy_(torch.randn(p.shape) / (2 if p.ndim == 1 else p.shape[-1] ** 0.5))
    return made


def given(kind, length=N, batch=B):
    """Ids for a language model, vectors for a mixer."""
    draw = torch.Generator().manual_seed(1)
    if kind in MIXERS:
        return torch.randn(batch, length, E, generator=draw)
    return torch.randint(V, (batch, length), generator=draw)


def layers(kind):
    """The names of all layers that have weights."""
    found = make(kind).named_modules()
    return [name for name, layer in found if hasattr(layer, "weight")]


EVERY_LAYER = [(kind, name) for kind in MODELS for name in layers(kind)]
RESETS = torch.arange(N).expand(B, N) % 4 == 2


# --- adapters ------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """peft looks for layers below a model."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)


@pytest.mark.parametrize(
    "kind, name", [(kind, name) for kind, name in EVERY_LAYER if "norm" not in name], ids=lambda value: value
)
def test_lora_trains_every_layer_and_merging_changes_nothing(kind, name):
    import peft

    model, x = make(kind), given(kind)
    before = model(x).detach()
    rank = model.get_submodule(name).groups if "conv1d" in name else 2  # peft wants a multiple of the groups
    config = peft.LoraConfig(target_modules=re.escape(f"model.{name}"), r=rank, lora_alpha=2 * rank)
    adapted = peft.get_peft_model(Model(model), config)
    torch.testing.assert_close(adapted(x), before, atol=1e-6, rtol=1e-5)  # an adapter begins with nothing
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        loss = (adapted(x) - before - 1).square().mean()
        loss.backward()
        for p in trained:
            p.grad /= p.grad.norm() + 1e-12
        optimizer.step()
    assert all(p.grad.norm() > 0.5 for p in trained), "every weight of the adapter learns"
    after = adapted(x).detach()
    size = before.abs().max().item()
    assert (after - before).abs().max() > 1e-4 * size
    if "conv1d" not in name:  # peft does not merge a convolution by groups
        torch.testing.assert_close(adapted.merge_and_unload()(x), after, atol=1e-6 * size, rtol=1e-5)


def test_generating_hears_an_adapter():
    """In steps of one token, with caches, also where the tied embeddings are adapted."""
    import peft

    for name in ("embeddings", "layers.0.mixer.dt_proj", "layers.1.mixer.in_proj"):
        model = make("tied")
        config = peft.LoraConfig(target_modules=name.split(".")[-1:], r=2, init_lora_weights=False)
        peft.get_peft_model(Model(model), config)
        ids = given("tied", 3)
        for _ in range(5):
            ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], 1)
        assert torch.equal(model.generate(given("tied", 3), 5), ids)


# --- hooks and parametrizations ------------------------------------------------------------------------------------


def calls(kind):
    """The ways to call a module: a name and a function of the module."""
    x, whole = given(kind), {"reset": RESETS}
    ways = {
        "plain": lambda m: m(x),
        "cached": lambda m: m(x, cache=m.new_cache(B)),
        "reset": lambda m: m(x, **whole),
        "one": lambda m: m(x[:, :1], cache=m.new_cache(B)),
    }
    return ways


@pytest.mark.parametrize("kind, name", EVERY_LAYER, ids=lambda value: value)
def test_hooks_are_called_once_a_forward_and_change_nothing_by_listening(kind, name):
    for way, call in calls(kind).items():
        model, counts = make(kind), {"before": 0, "after": 0}
        right = call(model)
        layer = model.get_submodule(name)
        layer.register_forward_pre_hook(lambda *_, counts=counts: counts.update(before=counts["before"] + 1))
        layer.register_forward_hook(lambda *_, counts=counts: counts.update(after=counts["after"] + 1))
        found = call(model)
        assert counts == {"before": 1, "after": 1}, way
        torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-5, msg=way)


@pytest.mark.parametrize("kind, name", EVERY_LAYER, ids=lambda value: value)
def test_what_a_hook_returns_is_heard(kind, name):
    """A hook that returns zeros is the layer with weight and bias of zero. Tied scores keep their own weight."""
    for way, call in calls(kind).items():
        hooked, zero = make(kind), make(kind)
        hooked.get_submodule(name).register_forward_hook(lambda _, args, out: torch.zeros_like(out))
        if (kind, name) == ("tied", "embeddings"):
            zero.embeddings.register_forward_pre_hook(lambda _, args: (torch.zeros_like(args[0]),))
            zero.embeddings.weight.data[0] = 0
            hooked.embeddings.weight.data[0] = 0
        else:
            for p in zero.get_submodule(name).parameters():
                p.data.zero_()
        torch.testing.assert_close(call(hooked), call(zero), atol=1e-6, rtol=1e-5, msg=way)


@pytest.mark.parametrize("kind", MODELS)
def test_backward_hooks_are_called(kind):
    names = [name for k, name in EVERY_LAYER if k == kind]
    model, seen = make(kind), []
    for name in names:
        model.get_submodule(name).register_full_backward_hook(lambda *_, name=name: seen.append(name))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ids have no gradient
        model(given(kind)).square().sum().backward()
    assert sorted(seen) == sorted(names)


def test_global_hooks_hear_every_layer():
    for kind in MODELS:
        model, seen = make(kind), []
        hook = torch.nn.modules.module.register_module_forward_hook(
            lambda module, *_, seen=seen: seen.append(id(module))
        )
        try:
            model(given(kind))
        finally:
            hook.remove()
        named = {id(model.get_submodule(name)) for k, name in EVERY_LAYER if k == kind}
        assert named <= set(seen)


class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize("kind, name", EVERY_LAYER, ids=lambda value: value)
def test_a_parametrization_is_heard(kind, name):
    for way, call in calls(kind).items():
        doubled, by_hand = make(kind), make(kind)
        parametrize.register_parametrization(doubled.get_submodule(name), "weight", Twice())
        by_hand.get_submodule(name).weight.data *= 2
        torch.testing.assert_close(call(doubled), call(by_hand), atol=1e-6, rtol=1e-5, msg=way)


@pytest.mark.parametrize("kind", MIXERS)
def test_weights_that_are_made_before_each_call(kind):
    """weight_norm, old and new, and pruning: g in front of a direction, and a mask."""
    for name in [name for k, name in EVERY_LAYER if k == kind and name != "norm"]:
        for normed in (nn.utils.weight_norm, nn.utils.parametrizations.weight_norm):
            model, right = make(kind), make(kind)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                layer = normed(model.get_submodule(name))
            g = layer.weight_g if hasattr(layer, "weight_g") else layer.parametrizations.weight.original0
            g.data *= 3
            right.get_submodule(name).weight.data *= 3
            torch.testing.assert_close(model(given(kind)), right(given(kind)), atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("kind", MIXERS)
def test_layers_of_other_classes(kind):
    """A subclass of nn.Linear that does something else, one whose forward was replaced, and a quantised one."""

    class Louder(nn.Linear):
        def forward(self, x):
            return 3 * super().forward(x)

    x = given(kind)
    linears = [name for name, layer in make(kind).named_modules() if type(layer) is nn.Linear]
    for name in linears:
        right = make(kind)
        for p in right.get_submodule(name).parameters():
            p.data *= 3
        subclass, replaced = make(kind), make(kind)
        subclass.get_submodule(name).__class__ = Louder
        layer = replaced.get_submodule(name)
        layer.forward = lambda x, layer=layer: 3 * nn.Linear.forward(layer, x)
        for model in (subclass, replaced):
            torch.testing.assert_close(model(x), right(x), atol=1e-5, rtol=1e-5, msg=name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(make(kind), {nn.Linear}, dtype=torch.float16)
        replaced = type(quantised.in_proj).__module__
    assert "quantized" in replaced and not isinstance(quantised.in_proj, nn.Linear)
    torch.testing.assert_close(quantised(x), make(kind)(x), atol=1e-2, rtol=1e-2)
    cache = quantised.new_cache(B)
    torch.testing.assert_close(quantised.step(x[:, 0], cache), quantised(x)[:, 0], atol=1e-4, rtol=1e-4)


def test_a_norm_without_a_weight():
    block = MambaBlock(Mamba(E), E)
    block.norm = nn.RMSNorm(E, elementwise_affine=False, eps=1e-5)
    right = MambaBlock(block.mixer, E)
    torch.testing.assert_close(block(given("mamba")), right(given("mamba")))


# --- nothing that raises has changed a cache -----------------------------------------------------------------------


def all_of(cache):
    return [(one.conv, one.state) for one in (cache if isinstance(cache, list) else [cache])]


class Broken(Exception):
    pass


def raises(*_):
    raise Broken


@pytest.mark.parametrize("kind, name", EVERY_LAYER, ids=lambda value: value)
def test_a_layer_that_raises_has_changed_no_cache(kind, name):
    """Whichever layer it is, the caches are the very tensors that they were, and the next call gives what is right."""
    model, x = make(kind), given(kind)
    cache, right = model.new_cache(B), model.new_cache(B)
    model(x[:, :4], cache=cache), model(x[:, :4], cache=right)
    before = all_of(cache)
    handle = model.get_submodule(name).register_forward_hook(raises)
    for part in (x[:, 4:], x[:, 4:5]):
        with pytest.raises(Broken):
            model(part, cache=cache)
        assert all(a is b for old, new in zip(before, all_of(cache)) for a, b in zip(old, new))
    handle.remove()
    torch.testing.assert_close(model(x[:, 4:], cache=cache), model(x[:, 4:], cache=right))


@pytest.mark.parametrize("kind", MODELS)
def test_what_is_refused_has_changed_no_cache(kind):
    model, x = make(kind), given(kind)
    cache = model.new_cache(B)
    model(x, cache=cache)
    before = all_of(cache)
    values = [(a.clone(), b.clone()) for a, b in before]
    wrong = [
        dict(reset=torch.zeros(B, N + 1, dtype=torch.bool)),
        dict(reset=torch.zeros(B, N)),
        dict(x=given(kind, batch=3)),
        dict(x=given(kind).double() if kind in MIXERS else given(kind) + V),
        dict(x=given(kind)[0]),
        dict(x=given(kind).tolist()),
        dict(x=given(kind).numpy()),
    ]
    for change in wrong:
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            model(change.get("x", x), cache=cache, reset=change.get("reset"))
        for (conv, state), was, value in zip(all_of(cache), before, values):
            assert conv is was[0] and state is was[1] and conv.equal(value[0]) and state.equal(value[1])


def test_a_wrong_cache_in_a_later_layer_leaves_the_earlier_ones():
    model, x = make("tied"), given("tied")
    cache = model.new_cache(B)
    model(x, cache=cache)
    for wrong, says in (
        (model.new_cache(3)[1], r"cache.conv must be \(2, 3, 16\)"),
        (MambaCache(cache[1].conv, cache[1].state[..., :-1]), r"cache.state must be"),
        (cache[1].state, r"cache must be a MambaCache"),
    ):
        first = (cache[0].conv, cache[0].state)
        with pytest.raises((ValueError, TypeError), match=says):
            model(x, cache=[cache[0], wrong])
        assert cache[0].conv is first[0] and cache[0].state is first[1]
    with pytest.raises(TypeError, match=r"cache must be a list of one MambaCache a layer.*, got MambaCache"):
        model(x, cache=cache[0])


@pytest.mark.parametrize("kind", MODELS)
def test_copies_of_modules_and_caches(kind):
    model, x = make(kind), given(kind)
    with torch.no_grad():
        cache, right = model.new_cache(B), model.new_cache(B)
        model(x[:, :5], cache=cache), model(x[:, :5], cache=right)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            torch.testing.assert_close(other(x), model(x))
        fresh = MODELS[kind]()
        fresh.load_state_dict(model.state_dict())
        torch.testing.assert_close(fresh(x), model(x))
        expected = model(x[:, 5:], cache=right)
        for again in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)),
                      [copy.copy(one) for one in cache] if isinstance(cache, list) else copy.copy(cache)):  # fmt: skip
            torch.testing.assert_close(model(x[:, 5:], cache=again), expected)
        torch.testing.assert_close(model(x[:, 5:], cache=cache), expected)  # the copies changed nothing in it


# --- compilation and export ----------------------------------------------------------------------------------------

# The compiler traces every layer anew: one is enough for it here. language_models/test_causal.py compiles a MambaLM
# of two.
SHALLOW = {
    **MIXERS,
    "tied": partial(MambaLM, V, E, 1, mixer=partial(Mamba, d_state=5)),
    "untied": partial(MambaLM, V, E, 1, mixer=partial(Mamba2, d_state=5, d_head=4), tied=False),
}


def compiled_and_counted(function):
    """The function compiled whole, and a counter of how often it was."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    return torch.compile(function, fullgraph=True, backend=counter), counter


@pytest.mark.parametrize("kind", SHALLOW)
def test_two_compilations_serve_every_length(kind):
    """The first length is taken for a constant, the second makes a program for all: chunks of any number too."""
    model = make(kind, SHALLOW)
    compiled, counter = compiled_and_counted(model)
    for length in (5, 7, 9, 13, 16, 33, 70):
        x = given(kind, length)
        torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-4)
    assert counter.frame_count == 2


@pytest.mark.parametrize("kind", MODELS)
def test_one_exported_program_serves_every_batch_and_length(kind):
    model = make(kind).eval()
    sizes = {0: torch.export.Dim("batch", min=2), 1: torch.export.Dim("length", min=2)}
    program = torch.export.export(model, (given(kind, 6),), dynamic_shapes=(sizes,)).module()
    for length, batch in ((6, 2), (2, 2), (11, 3), (70, 2)):
        x = given(kind, length, batch)
        torch.testing.assert_close(program(x), model(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", SHALLOW)
@torch.no_grad()
def test_decoding_compiles_once(kind):
    model, x = make(kind, SHALLOW), given(kind)
    cache, right = model.new_cache(B), model.new_cache(B)
    compiled, counter = compiled_and_counted(lambda x, cache: model(x, cache=cache))
    for t in range(5):
        one = x[:, t : t + 1]
        torch.testing.assert_close(compiled(one, cache), model(one, cache=right), atol=1e-6, rtol=1e-5)
    for (conv, state), (conv_right, state_right) in zip(all_of(cache), all_of(right)):
        torch.testing.assert_close((conv, state), (conv_right, state_right), atol=1e-6, rtol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", MODELS)
def test_shapes_alone(kind):
    """On the meta device, with caches and resets; ids have no values to be checked there."""
    with torch.device("meta"):
        model = MODELS[kind]()
        x = given(kind).to("meta")
        cache = model.new_cache(B)
        y = model(x, cache=cache, reset=RESETS.to("meta"))
    assert y.is_meta and y.shape == (B, N, E if kind in MIXERS else V)
    assert all(conv.is_meta and state.is_meta for conv, state in all_of(cache))


# --- transforms of torch.func --------------------------------------------------------------------------------------


def loss_of(model, kind):
    """A function of parameters and one sample."""

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x[None],)).square().mean()

    return loss


@pytest.mark.parametrize("kind", MODELS)
def test_gradients_of_each_sample(kind):
    """vmap over grad, against one backward pass for each sample."""
    model, x = make(kind), given(kind, batch=3)
    parameters = dict(model.named_parameters())
    loss = loss_of(model, kind)
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(3):
        right = dict(zip(parameters, torch.autograd.grad(loss(parameters, x[i]), list(parameters.values()))))
        for name, gradient in right.items():
            size = gradient.abs().max().item()
            torch.testing.assert_close(each[name][i], gradient, atol=1e-5 * size, rtol=1e-4, msg=name)


@pytest.mark.parametrize("kind", MODELS)
def test_forward_mode_and_reverse_mode_agree(kind):
    """For every parameter: the derivative along a direction, forward, is the gradient's product with it."""
    model, x = make(kind).double(), given(kind)
    x = x.double() if kind in MIXERS else x
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    draw = torch.Generator().manual_seed(2)
    direction = {name: torch.randn(p.shape, generator=draw, dtype=p.dtype) for name, p in parameters.items()}

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (x,)).square().mean()

    gradient = torch.func.grad(loss)(parameters)
    for name in parameters:
        along = {n: d if n == name else torch.zeros_like(d) for n, d in direction.items()}
        _, forward = torch.func.jvp(loss, (parameters,), (along,))
        backward = (gradient[name] * direction[name]).sum()
        assert backward != 0
        torch.testing.assert_close(forward, backward, atol=1e-10, rtol=1e-8, msg=name)


@pytest.mark.parametrize("kind", MIXERS)
def test_vmap_and_jacobians_by_input(kind):
    model, x = make(kind).double(), given(kind, 4, 3).double()
    torch.testing.assert_close(torch.func.vmap(model)(x[:, None]), model(x)[:, None])
    by_rows = torch.func.jacrev(lambda x: model(x[None])[0])(x[0])
    by_columns = torch.func.jacfwd(lambda x: model(x[None])[0])(x[0])
    right = torch.autograd.functional.jacobian(lambda x: model(x[None])[0], x[0])
    torch.testing.assert_close(by_rows, right)
    torch.testing.assert_close(by_columns, right)


def test_the_loss_of_each_sample():
    model, ids = make("tied"), given("tied", batch=3)
    parameters = dict(model.named_parameters())

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model.loss(ids)

    def loss(parameters, ids):
        return torch.func.functional_call(Loss(), {f"model.{n}": p for n, p in parameters.items()}, (ids[None],))

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, ids)
    for i in range(3):
        right = torch.autograd.grad(model.loss(ids[i : i + 1]), list(parameters.values()))
        for (name, found), gradient in zip(each.items(), right):
            size = gradient.abs().max().item()
            torch.testing.assert_close(found[i], gradient, atol=1e-5 * size, rtol=1e-4, msg=name)


# --- engines -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MIXERS)
def test_by_the_triton_engine(kind):
    """z, B, C and the step lengths are slices of larger tensors here: outputs, caches and every gradient."""
    x, g = given(kind, 7), torch.randn(B, 7, E, generator=torch.Generator().manual_seed(3))
    reset = torch.arange(7).expand(B, 7) == 5
    found = {}
    for impl in ("reference", "triton"):
        more = {"chunk": None} if kind == "mamba2" else {}
        model, u = make(kind, impl=impl, **more), x.clone().requires_grad_()
        cache = model.new_cache(B)
        first, second = model(u[:, :3], cache=cache), model(u[:, 3:], cache=cache, reset=reset[:, 3:])
        y = torch.cat([first, second], 1)
        y.backward(g)
        gradients = {name: p.grad for name, p in model.named_parameters()}
        found[impl] = {"y": y, "x": u.grad, "conv": cache.conv, "state": cache.state, **gradients}
    for name, right in found["reference"].items():
        size = right.abs().max().item()
        torch.testing.assert_close(found["triton"][name], right, atol=2e-6 * size, rtol=1e-5, msg=name)


@pytest.mark.parametrize("kind", MIXERS)
def test_impl_reaches_the_operation(kind, monkeypatch):
    file, name = (mamba_file, "selective_scan") if kind == "mamba" else (mamba2_file, "ssd")
    operation, asked = getattr(file, name), []
    monkeypatch.setattr(file, name, lambda *args, **kw: asked.append(kw["impl"]) or operation(*args, **kw))
    x = given(kind)
    for impl in ("auto", "reference", "cpu" if kind == "mamba" else "chunked"):
        model = make(kind, impl=impl)
        model(x), model(x[:, :1])
    # With "auto", one position goes by the plain loop: it is the fastest.
    assert asked == ["auto", "reference", "reference", "reference", impl, impl]


@pytest.mark.parametrize("kind", MIXERS)
def test_what_is_kept_in_float32_when_parameters_are_narrow(kind, monkeypatch):
    """A, computed from its logarithm, and the state; the window of the convolution has the parameters' dtype."""
    file, name = (mamba_file, "selective_scan") if kind == "mamba" else (mamba2_file, "ssd")
    operation, seen = getattr(file, name), []
    monkeypatch.setattr(file, name, lambda *args, **kw: seen.append((args[2], kw["state"])) or operation(*args, **kw))
    for dtype in (torch.bfloat16, torch.float16):
        model, x = make(kind).to(dtype), given(kind).to(dtype)
        cache = model.new_cache(B)
        assert cache.conv.dtype == dtype and cache.state.dtype == torch.float32
        for part in (x[:, :4], x[:, 4:5], x[:, 5:]):
            assert model(part, cache=cache).dtype == dtype
            assert cache.conv.dtype == dtype and cache.state.dtype == torch.float32
        for A, state in seen:
            assert A.dtype == state.dtype == torch.float32
            torch.testing.assert_close(A, -model.A_log.float().exp(), atol=0, rtol=1e-6)
        seen.clear()


# --- extreme values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MIXERS)
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_gates_far_from_zero(kind, impl):
    """z of 200 lets everything through and z of -200 nothing: against float64, outputs and gradients, all finite."""
    model = make(kind, impl=impl, bias=True)
    gate = slice(model.d_inner, None) if kind == "mamba" else slice(0, model.d_inner)
    with torch.no_grad():
        model.in_proj.weight[gate] = 0
        rows = model.in_proj.bias[gate]
        rows[: model.d_inner] = 200.0 * (1 - 2 * (torch.arange(model.d_inner) % 3 == 0))
        model.in_proj.bias[gate] = rows
        if kind == "mamba2":
            model.in_proj.weight[gate] = 0
    results = []
    for dtype in (torch.float32, torch.float64):
        m = copy.deepcopy(model).to(dtype)
        x = given(kind).to(dtype).requires_grad_()
        y = m(x)
        y.square().sum().backward()
        results.append({"y": y.detach(), "x": x.grad, **{name: p.grad for name, p in m.named_parameters()}})
    for name, right in results[1].items():
        size = right.abs().max().item()
        assert results[0][name].isfinite().all(), name
        torch.testing.assert_close(results[0][name].double(), right, atol=2e-5 * size, rtol=1e-4, msg=name)


@pytest.mark.parametrize("kind", MIXERS)
def test_steps_of_no_length_and_of_all_length(kind):
    """Step lengths of 0 keep the state, to the bit, and write nothing; very long ones empty it. All is finite."""
    model, x = make(kind), given(kind)
    bias = model.dt_proj.bias if kind == "mamba" else model.dt_bias
    for value, kept in ((-300.0, True), (300.0, False)):
        with torch.no_grad():
            bias.fill_(value)
        cache = model.new_cache(B)
        cache.state = torch.randn(cache.state.shape, generator=torch.Generator().manual_seed(4)) * 1e4
        before = cache.state
        y = model(x, cache=cache)
        y.sum().backward()
        assert y.isfinite().all() and cache.state.isfinite().all()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        if kept:
            torch.testing.assert_close(cache.state, before, atol=0, rtol=1e-6)
        else:  # nothing of the old state is left: another gives the same
            other = model.new_cache(B)
            model(x, cache=other)
            torch.testing.assert_close(cache.state, other.state, atol=0, rtol=1e-6)


def test_limits_of_the_step_hold_at_both_ends(monkeypatch):
    """dt_limit clamps the lengths that the scan gets, in half precision to its rounding; gradients stop there."""
    operation, seen = mamba2_file.ssd, []
    monkeypatch.setattr(mamba2_file, "ssd", lambda *a, **kw: seen.append((a[1], a[7], kw)) or operation(*a, **kw))
    for dtype, slack in ((torch.float32, 0), (torch.bfloat16, 2**-8)):
        for bias, bound in ((-300.0, 0.01), (300.0, 0.5)):
            model = make("mamba2", dt_limit=(0.01, 0.5)).to(dtype)
            with torch.no_grad():
                model.dt_bias.fill_(bias)
            model(given("mamba2").to(dtype)).sum().backward()
            delta, own_bias, kw = seen.pop()
            assert own_bias is None and not kw["delta_softplus"]
            assert ((delta.double() / bound - 1).abs() <= slack + 1e-7).all()
            assert not model.dt_bias.grad.any()


@pytest.mark.parametrize("kind", MIXERS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e8, -1e8])
def test_the_last_input_moves_nothing_before_it(kind, value):
    """Not by a bit, for large numbers. A NaN stays in its own row and step too, in the plain engine of each."""
    for impl in ("auto", "reference", "cpu") if kind == "mamba" else ("auto", "reference", "chunked"):
        model, x = make(kind, impl=impl), given(kind)
        spoiled = x.clone()
        spoiled[0, -1] = value
        if kind == "mamba2" and impl != "reference" and not torch.tensor(value).isfinite():
            continue  # nondual.ops.ssd says that it may reach its neighbours in a chunk
        y, right = model(spoiled), model(x)
        assert torch.equal(y[0, :-1], right[0, :-1]), impl
        torch.testing.assert_close(y[1], right[1], atol=0, rtol=1e-6)
