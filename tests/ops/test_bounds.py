"""Which tiles, spans and chunks the kernels visit, by brute force over every small case.

A kernel's bounds are integer arithmetic. Here the kernel's own Python body runs with whole numbers in place of
Triton's: all else (loads, products, stores) is a stand-in that does nothing, and what the loops visit is recorded. That
takes microseconds for a case, so that every small length, window and tile can be tried; the interpreter is too slow.
"""

import types
from itertools import product

import pytest
import torch

from nondual.ops import masks
from nondual.ops.flash_attention import reference
from nondual.ops.flash_attention.triton import backward, forward, launch, primitives
from nondual.ops.selective_scan import triton as scan
from nondual.ops.ssd import triton as ssd

# --- a kernel's body on whole numbers ------------------------------------------------------------------------------


class Whole(int):
    """An integer of the chip: division cuts towards 0 there, where Python's goes down."""

    def __floordiv__(self, other):
        return Whole(abs(int(self)) // int(other) * (1 if self >= 0 else -1))

    def __mod__(self, other):
        return Whole(int(self) - int(self // other) * int(other))

    def to(self, dtype):
        return self


def _arithmetic(name):
    def operation(self, other):
        answer = getattr(int, name)(self, other)
        return Whole(answer) if isinstance(answer, int) else answer

    return operation


for _name in ("__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__"):
    setattr(Whole, _name, _arithmetic(_name))


class Anything:
    """A tensor or pointer whose values do not matter: whatever is done with it gives it back."""

    def __getattr__(self, name):
        return self

    def __call__(self, *_, **__):
        return self

    def __iter__(self):  # `a, b = f(…)`
        return iter(())

    def __bool__(self):
        raise TypeError("a bound may not depend on a tensor's values")


def _nothing(self, *_):
    return self


for _name in "add radd sub rsub mul rmul truediv rtruediv floordiv rfloordiv mod rmod and rand or ror".split():
    setattr(Anything, f"__{_name}__", _nothing)
for _name in "lt le gt ge eq ne neg getitem invert".split():
    setattr(Anything, f"__{_name}__", _nothing)


class Language:
    """What a kernel's body may ask of `tl`."""

    def __init__(self, program, events):
        self.program, self.events = Whole(program), events

    def __getattr__(self, name):
        return ANYTHING

    def program_id(self, axis):
        return self.program

    def maximum(self, a, b):
        return Whole(max(a, b)) if isinstance(a, int) and isinstance(b, int) else ANYTHING

    def minimum(self, a, b):
        return Whole(min(a, b)) if isinstance(a, int) and isinstance(b, int) else ANYTHING

    def cdiv(self, a, b):
        return Whole(a + b - 1) // b

    def range(self, start, stop, step=1):
        return (Whole(i) for i in range(start, stop, step))

    def static_range(self, start, stop):
        return range(start, stop)

    def debug_barrier(self):
        self.events.append(("barrier",))


ANYTHING = Anything()


def visits(module, kernel, program, recorded: dict, real: tuple[str, ...], **arguments) -> list[tuple]:
    """Run a program of a kernel, and say what it called in which order.

    Args:
        module: where the kernel lives.
        kernel: its name there.
        program: the index of the program.
        recorded: for each named step, what of its arguments is to be recorded and what it returns.
        real: the named steps that run as they are.
        arguments: the kernel's arguments that are numbers or None; the others are stand-ins.
    """
    events: list[tuple] = []
    space = {"tl": Language(program, events), "LOG2_E": 1, "LN_2": 1, "__builtins__": __builtins__}

    def record(name, function):
        names = function.__code__.co_varnames[: function.__code__.co_argcount]
        chosen, returned = recorded[name]

        def step(*given, **named):
            known = dict(zip(names, function.__defaults__ or ())) | dict(zip(names, given)) | named
            events.append((name, *(known[x] for x in chosen)))
            return returned

        return step

    for name, value in vars(module).items():
        function = getattr(value, "fn", None)
        if name in recorded:
            space[name] = record(name, function)
        elif name in real:
            space[name] = types.FunctionType(function.__code__, space, name, function.__defaults__)
        elif function is not None:
            space[name] = ANYTHING
    body = getattr(module, kernel).fn
    names = body.__code__.co_varnames[: body.__code__.co_argcount]
    given = {x: Whole(v) if type(v) is int else v for x, v in arguments.items() if x in names}
    types.FunctionType(body.__code__, space)(**({x: ANYTHING for x in names} | given))
    return events


# --- flash attention -----------------------------------------------------------------------------------------------

LENGTHS = range(1, 10)
WINDOWS = (0, 1, 2, 3, 5, 8, 11)
TILES = ((1, 1), (2, 2), (2, 3), (3, 2), (4, 2), (2, 4), (4, 4))


def seen_by(n: int, m: int, causal: bool, window: int) -> torch.Tensor:
    """The mask of `nondual.ops.masks` that these options mean."""
    if window:
        return masks.sliding_window(n, m, window=window)
    return masks.causal(n, m) if causal else torch.ones(n, m, dtype=torch.bool)


def check_tiles(seen: torch.Tensor, tiles: list[tuple[range, range, bool]], where) -> None:
    """Every visible pair in one visited tile; no tile without a visible pair; masked just where it has to be.

    Args:
        seen: (rows, columns), True where visible.
        tiles: rows and columns of each visited tile, as far as the tile reaches, and whether it is masked.
        where: said with a failure.
    """
    left = seen.clone()
    for rows, columns, masked in tiles:
        inside = 0 <= columns.start and columns.stop <= seen.shape[1]
        assert 0 <= columns.start < seen.shape[1], f"a tile outside of the tensor: {where}"
        part = slice(rows.start, min(rows.stop, seen.shape[0])), slice(columns.start, min(columns.stop, seen.shape[1]))
        assert seen[part].any(), f"a tile without a visible pair is visited: {where} {rows} {columns}"
        whole = inside and bool(seen[part].all())
        assert masked or whole, f"a tile with a masked pair is not masked: {where} {rows} {columns}"
        assert not masked or not whole, f"a whole tile is masked: {where} {rows} {columns}"
        assert (left[part] == seen[part]).all(), f"a tile is visited twice: {where} {rows} {columns}"
        left[part] = False
    assert not left.any(), f"visible pairs are never visited: {where} {left.nonzero().tolist()}"


def flash_cases():
    """(n, m, causal, window) of every small case that the door lets through."""
    for n, m, window in product(LENGTHS, LENGTHS, WINDOWS):
        for causal in (False, True) if not window else (True,):
            yield n, m, causal, window


STEP = (("lo", "hi", "MASKED"), (ANYTHING,) * 3)


@pytest.mark.parametrize(
    "module, kernel, step", [(forward, "forward_kernel", "attend"), (backward, "dq_kernel", "gather_dq")]
)
def test_tiles_of_keys(module, kernel, step):
    """Forward, and backward for dq: a tile of queries passes the keys."""
    recorded = {step: (STEP[0], (ANYTHING,) * 3 if step == "attend" else ANYTHING)}
    for (n, m, causal, window), (block_q, block_kv) in product(flash_cases(), TILES):
        seen, visited = seen_by(n, m, causal, window), []
        for program in range(-(-n // block_q)):
            events = visits(
                module, kernel, program, recorded, ("key_bounds", "attend_all"), n=n, m=m, heads=1, window=window,
                SHARE=1, CAUSAL=causal, WINDOWED=window > 0, BLOCK_Q=block_q, BLOCK_KV=block_kv,
            )  # fmt: skip
            i = -(-n // block_q) - 1 - program  # the last tile first
            for _, lo, hi, masked in events:
                for start in range(lo, hi, block_kv):
                    visited.append((range(i * block_q, (i + 1) * block_q), range(start, start + block_kv), masked))
        check_tiles(seen, visited, (n, m, causal, window, block_q, block_kv))


def test_tiles_of_queries():
    """Backward for dk and dv: a tile of keys passes the queries that see it."""
    recorded = {"gather_dkdv": (STEP[0], (ANYTHING,) * 2)}
    for (n, m, causal, window), (block_q, block_kv) in product(flash_cases(), TILES):
        seen, visited = seen_by(n, m, causal, window), []
        for program in range(-(-m // block_kv)):
            events = visits(
                backward, "dkdv_kernel", program, recorded, ("query_bounds",), n=n, m=m, groups=1, window=window,
                SHARE=1, CAUSAL=causal, WINDOWED=window > 0, BLOCK_Q=block_q, BLOCK_KV=block_kv,
            )  # fmt: skip
            for _, lo, hi, masked in events:
                for start in range(lo, hi, block_q):
                    visited.append(
                        (range(program * block_kv, (program + 1) * block_kv), range(start, start + block_q), masked)
                    )
        check_tiles(seen.T, visited, (n, m, causal, window, block_q, block_kv))


def test_the_mask_within_a_tile():
    """`visible`, which the masked tiles go by, is the mask of `nondual.ops.masks`, and nothing beyond the last key."""
    for n, m, causal, window in flash_cases():
        q, kv = torch.arange(n)[:, None], torch.arange(m + 3)[None]
        seen = primitives.visible.fn(q, kv, m, m - n, window, causal, window > 0).expand(n, m + 3)
        assert torch.equal(seen[:, :m], seen_by(n, m, causal, window)) and not seen[:, m:].any(), (n, m, causal, window)


class Launched(Exception):
    """The launcher has come as far as the launch."""


def test_tiles_of_split_keys(monkeypatch):
    """Decoding: the parts of the keys that the launcher cuts, and the tiles of each that its program passes."""
    recorded = {"attend": STEP}
    launched = {}

    class Recorder:
        def __getitem__(self, grid):
            def launch(*given, **named):
                names = real.fn.__code__.co_varnames[: real.fn.__code__.co_argcount]
                launched.update(dict(zip(names, given)) | named | {"programs": grid[0]})
                raise Launched

            return launch

    real = launch.decode_kernel
    for (n, m, causal, window), block_kv, splits in product(flash_cases(), (1, 2, 3, 4), (1, 2, 3, 7)):
        if n > 4:  # decoding has few queries
            continue
        q, kv = torch.empty(1, 1, n, 1, device="meta"), torch.empty(1, 1, m, 1, device="meta")
        with monkeypatch.context() as patch:
            patch.setattr(launch, "decode_kernel", Recorder())
            tiles = {"BLOCK_Q": 16, "BLOCK_KV": block_kv}
            patch.setattr(launch, "configuration", lambda *_, tiles=tiles: dict(tiles))
            with pytest.raises(Launched):
                launch.launch_decode(q, kv, kv, causal, window, 1.0, splits)
        seen, visited = seen_by(n, m, causal, window), []
        numbers = {x: launched[x] for x in ("n", "m", "groups", "window", "first", "length", "splits")}
        assert launched["programs"] == launched["splits"] <= splits
        assert numbers["first"] % block_kv == numbers["length"] % block_kv == 0
        for program in range(launched["programs"]):
            events = visits(
                forward, "decode_kernel", program, recorded, ("key_bounds", "attend_all"), **numbers, SHARE=1,
                CAUSAL=causal, WINDOWED=window > 0, BLOCK_Q=16, BLOCK_KV=block_kv,
            )  # fmt: skip
            passed = [
                (range(n), range(i, i + block_kv), masked)
                for _, lo, hi, masked in events
                for i in range(lo, hi, block_kv)
            ]
            assert passed, f"a program without keys: {(n, m, causal, window, block_kv, splits)}"
            visited += passed
        check_tiles(seen, visited, (n, m, causal, window, block_kv, splits))


def test_tiles_of_the_reference():
    """The plain torch engine, forward and backward: its tiles are cut at the last key that is seen."""
    for (n, m, causal, window), (block_q, block_kv) in product(flash_cases(), TILES[1:5]):
        seen, visited = seen_by(n, m, causal, window), []
        visible = reference.Visible(n, m, causal, window or None, torch.device("cpu"))
        for queries in reference.tiles(range(n), block_q):
            for keys in reference.tiles(visible.span(queries), block_kv):
                part = seen[queries.start : queries.stop, keys.start : keys.stop]
                assert part.shape == (len(queries), len(keys)), "a tile reaches past the tensor"
                assert torch.equal(visible.mask(queries, keys), part), (n, m, causal, window)
                visited.append((queries, keys, not bool(part.all())))
        check_tiles(seen, visited, (n, m, causal, window, block_q, block_kv))


def test_the_references_backward_visits_the_same_pairs():
    """Counted in a run: the backward's tiles of keys are aligned, and none without a visible pair is visited."""
    for n, m, window in ((5, 5, 0), (3, 7, 2), (7, 3, 2), (6, 9, 4), (9, 2, 0), (4, 4, 1)):
        seen = seen_by(n, m, True, window)
        x = [torch.randn(1, 1, length, 2, requires_grad=True) for length in (n, m, m)]
        count = reference.Count()
        out, _ = reference.flash_attention(*x, causal=True, window=window or None, tile=(2, 3), count=count)
        forward = count.tiles
        out.sum().backward()
        needed = sum(bool(seen[i : i + 2, j : j + 3].any()) for i in range(0, n, 2) for j in range(0, m, 3))
        assert (forward, count.tiles - forward) == (needed, needed), (n, m, window)


# --- the scans -----------------------------------------------------------------------------------------------------


def planned(length: int, spans: int, monkeypatch) -> tuple[int, int]:
    """Steps of a span and how many spans there are, as the launcher plans them for chunks of CHUNK steps."""
    monkeypatch.setattr(scan, "CHUNK", CHUNK)
    monkeypatch.setattr(scan, "spans_of", lambda u: spans)
    u = torch.empty(1, length, 2)
    plan = scan.Plan(u, u, torch.empty(2, 2), u[:, :, None], u[:, :, None], None, None, None, True, None)
    assert plan.span % CHUNK == 0 and plan.span * (plan.spans - 1) < length <= plan.span * plan.spans
    return plan.span, plan.spans


CHUNK = 4
SIZES = {"GROUPS": 1, "B_GROUPS": 1, "C_GROUPS": 1, "D": 2, "N": 2, "CHUNK": CHUNK}
SCANS = [*product(range(1, 30), (1, 2, 3, 5)), *product((64, 97), (2, 5))]  # lengths and spans


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_steps_of_the_selective_scan(steps, monkeypatch):
    """Every step once and in order, in both levels; a state left where each chunk begins."""
    forward = {"scan_steps": (("t", "STEPS"), (ANYTHING,) * 3), "checkpoint": (("t",), None)}
    adjoint = {"adjoint_steps": (("t", "STEPS"), (ANYTHING,) * 3)}
    for length, wanted in SCANS:
        span, spans = planned(length, wanted, monkeypatch)
        numbers = SIZES | {"length": length, "span": span, "spans": spans, "BLOCK_D": 2, "BLOCK_N": 2, "STEPS": steps}
        done, asked = [], []
        for program in range(spans):
            for name, t, *rest in visits(
                scan, "forward_kernel", program, forward, ("place",), **numbers, p_decay=None, p_start=None
            ):
                if name == "checkpoint":
                    asked.append(int(t))
                else:
                    assert t in asked, "the state before these steps is not offered to the backward"
                    done += range(t, t + rest[0])
        assert done == list(range(length)), (length, span)
        if CHUNK % steps == 0:
            assert set(range(0, length, CHUNK)) <= set(asked), "a chunk begins without its state"

        done = []
        for program in reversed(range(spans)):
            for _, t, count in visits(scan, "adjoint_kernel", program, adjoint, ("place",), **numbers):
                done += reversed(range(t, t + count))
        assert done == list(reversed(range(length))), (length, span)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_steps_of_the_selective_scans_backward(steps, monkeypatch):
    """Every step once, from the last to the first; the states of a chunk computed again before they are used; a barrier
    between what is written to scratch and its use, and another before the next chunk overwrites it."""
    recorded = {
        "states_again": (("t", "STEPS"), ANYTHING),
        "backward_steps": (("t", "last", "STEPS", "EDGE"), (ANYTHING,) * 6),
    }
    for length, wanted in SCANS:
        span, spans = planned(length, wanted, monkeypatch)
        done = []
        for program in reversed(range(spans)):
            events = visits(
                scan, "backward_kernel", program, recorded, ("place",), **SIZES, length=length, span=span, spans=spans,
                D_LO=1, D_HI=2, N_HI=1, N_LO=2, STEPS=steps, p_end=None,
            )  # fmt: skip
            ready: list[int] = []
            for name, *rest in events:
                if name == "states_again":
                    ready.append(int(rest[0]) + rest[1])
                elif name == "backward_steps":
                    t, last, count, edge = rest
                    assert edge or t + count <= last, "steps past the end are not masked"
                    assert t % CHUNK == 0 or t in ready, "the states before these steps were not computed again"
                    done += [s for s in reversed(range(t, t + count)) if s < last]
            chunks = -(-min(span, length - program * span) // CHUNK)
            barriers = [i for i, (name, *_) in enumerate(events) if name == "barrier"]
            assert len(barriers) == 2 * chunks, "two barriers for each chunk: before its states are used, and after"
            for written, read in zip(barriers[::2], barriers[1::2]):
                assert all(name != "states_again" for name, *_ in events[written:read]), "written after the barrier"
        assert done == list(reversed(range(length))), (length, span)


def test_spans_of_the_selective_scan_follow_the_rule():
    """Two levels below 64 channels for each of 8 multiprocessors, into spans of two chunks or more."""
    for batch, length, channels in product((1, 2, 5), (0, 1, 15, 16, 31, 32, 33, 200, 1000), (1, 7, 255, 256, 512)):
        spans = scan.spans_of(torch.empty(batch, length, channels, device="meta"))
        assert spans >= 1
        if batch * channels >= scan.FULL * 8 or length < 4 * scan.CHUNK:
            assert spans == 1
        else:
            assert spans * 2 * scan.CHUNK <= length
            assert (spans - 1) * batch * channels < 2 * scan.FULL * 8


def test_splits_of_decoding_follow_the_rule():
    """Few queries and 512 visible keys or more; parts of 256 keys or more; at most 128 parts."""
    for n, heads, groups, m, window in product((1, 4, 9), (8, 16), (1, 8), (511, 512, 513, 5000, 10**6), (0, 300, 600)):
        q, k = torch.empty(1, heads, n, 1, device="meta"), torch.empty(1, groups, m, 1, device="meta")
        splits, seen = launch.splits_of(q, k, window), min(m, window + n - 1) if window else m
        assert (splits > 0) == (n * (heads // groups) <= 64 and seen >= 512)
        if splits:
            assert 1 <= splits <= 128 and splits * 256 <= seen


def test_the_heads_of_a_group_are_shared_out_whole():
    """State space duality's backward: the programs of a group take every head of it once."""
    for programs, share in product((1, 2, 3, 100), range(1, 20)):
        per = ssd.heads_of_a_program(programs, share, torch.device("cpu"))
        splits = -(-share // per)
        taken = [h for i in range(splits) for h in range(i * per, min(i * per + per, share))]
        assert taken == list(range(share)) and splits <= max(1, -(-4 // programs))
