"""Which values each integer of a kernel can take, from Triton's intermediate code and the arguments of one launch.

Run as a script, in a process in which triton compiles and does not interpret: `python tests/ops/intervals.py`. The
launchers run on tensors of torch's "meta" device, which have a size but no memory, so it may be any size. At each
launch the kernel is compiled as far as Triton's own intermediate code (TTIR), as the JIT would for these arguments, and
no further. Then an interval is computed for each integer: the arguments are known, a program's index lies between 0 and
the grid's size, and the rest follows operation by operation. Printed as JSON, for each launch:

- faults: sums and products in 32 bits that can overflow, and integers that could not be bounded
- dots, tf32: how many matrix products there are, and how many of them round to tf32
- both: for each tensor that the kernel both writes and reads, the order of stores (S), loads (L) and barriers (B)
- grid: the number of programs
"""

import json
import os
import re

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_ALWAYS_COMPILE"] = "1"  # a cached kernel would not pass through the compiler

INFINITE = float("inf")
LOOP = re.compile(r"scf\.for %([\w$.-]+) = (%[\w$.-]+(?:#\d+)?) to (%[\w$.-]+(?:#\d+)?)")
REDUCED = re.compile(r'%([\w$.-]+) = "tt\.reduce"\((%[\w$.-]+(?:#\d+)?)\)')
ASSIGNED = re.compile(r"^\s*%(?P<name>[\w$.-]+)(?::\d+)? = (?P<op>[\w.]+)(?P<rest>.*)$")


def width(line: str) -> int | None:
    """How many bits the integers have that a line of TTIR computes; None where it computes something else."""
    text = re.sub(r"\s*loc\(.*?\)+\s*$", "", line.rstrip(" {"))
    found = re.search(r"tt\.load .*!tt\.ptr<(i\d+)>", text) or re.search(
        r"(?:->|:| to)\s*(?:tensor<(?:\d+x)*)?(i\d+)>?\s*$", text
    )
    return int(found[1][1:]) if found else None


def hull(*ranges):
    """The least interval that holds them all."""
    return min(r[0] for r in ranges), max(r[1] for r in ranges)


def product(a, b):
    ends = [0 if 0 in (x, y) else x * y for x in a for y in b]
    return min(ends), max(ends)


def quotient(a, b):
    """Division rounds towards 0, and nothing divides by 0: b is taken to be 1 or more."""
    low, high = max(1, b[0]), max(1, b[1])
    ends = [x if abs(x) == INFINITE else abs(x) // y * (1 if x >= 0 else -1) for x in a for y in (low, high)]
    return min(ends), max(ends)


class Kernel:
    """One launch, analysed.

    Args:
        text: the kernel's TTIR.
        values: its integer arguments by name.
        grid: the number of programs.
        loaded: for arguments that hold 32-bit integers, between which two these lie. Those of others are indices of
            steps: -1 to `length`.
    """

    def __init__(self, text: str, values: dict[str, int], grid: int, loaded: dict[str, tuple[int, int]] | None = None):
        self.grid = grid
        self.loaded = loaded or {}
        self.reduced: tuple[str, tuple] | None = None  # the result of a reduction and what it is of, while it is told
        self.known: dict[str, tuple] = {name: (value, value) for name, value in values.items()}
        self.root: dict[str, str] = {}
        self.faults: list[str] = []
        self.events: dict[str, str] = {}
        self.order: list[tuple[str, str]] = []
        self.places = dict(re.findall(r"^#(loc\d*) = loc\((.*)\)$", text, re.MULTILINE))
        self.products = text.count("tt.dot ")
        self.tf32 = text.count("tf32")
        for argument in re.findall(r"%(\w+): !tt.ptr", text):
            self.root[argument] = argument
        for line in text.splitlines():
            self.line(line)

    def where(self, line: str) -> str:
        """folder/file:line of the source: TTIR names locations, which refer to one another."""
        place = re.search(r"loc\(#(loc\d*)\)\s*\{?$", line)
        said = self.places.get(place[1], "") if place else ""
        for _ in range(6):
            if found := re.search(r'"([^"]+\.py)":(\d+)', said):
                return f"{os.path.basename(os.path.dirname(found[1]))}/{os.path.basename(found[1])}:{found[2]}"
            inner = re.search(r"#(loc\d+)", said)
            said = self.places.get(inner[1], "") if inner else ""
        return line.strip()[:80]

    def of(self, name: str):
        return self.known.get(name.split("#")[0].lstrip("%"), (-INFINITE, INFINITE))

    def line(self, line: str) -> None:
        if "barrier" in line:
            self.order.append(("B", ""))
        if "tt.store" in line:
            self.order.append(("S", self.root.get(re.search(r"tt\.store %([\w$.-]+)", line)[1], "?")))
        if loop := LOOP.search(line):
            low, high = self.of(loop[2]), self.of(loop[3])
            self.known[loop[1]] = low[0], max(low[0], high[1] - 1)
            return
        if reduced := REDUCED.search(line):  # the greatest or the least of several integers
            self.reduced = reduced[1], self.of(reduced[2])
            self.known[reduced[1]] = self.reduced[1]
            return
        if line.strip().startswith("^bb0(") and self.reduced:
            self.known |= dict.fromkeys(re.findall(r"%([\w$.-]+): i\d+", line), self.reduced[1])
            return
        if self.reduced and "tt.reduce.return" in line:
            self.reduced = None
        found = ASSIGNED.match(line)
        if not found:
            return
        if self.reduced and found["op"] == "arith.addi":  # their sum: of how many is not known
            self.known[self.reduced[0]] = -INFINITE, INFINITE
        name, op, rest = found["name"], found["op"], found["rest"]
        operands = re.findall(r"%[\w$.-]+(?:#\d+)?", re.sub(r"loc\(.*", "", rest))
        given = [self.of(x) for x in operands]
        if operands and (
            root := next((r for x in operands if (r := self.root.get(x.lstrip("%").split("#")[0]))), None)
        ):
            if op == "tt.load":
                self.order.append(("L", root))
            elif op in ("tt.addptr", "tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape", "arith.select"):
                self.root[name] = root
        bits = width(line)
        if bits is None:
            return
        result = self.result(op, rest, given)
        if result is None:  # loaded, reduced or carried through a loop: any value of that width
            result = (0, 1) if bits == 1 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            if op == "tt.load" and bits == 32:  # kernels load no 32-bit integers but indices
                source = self.root.get(operands[0].lstrip("%").split("#")[0], "")
                result = self.loaded.get(source, (-1, self.known.get("length", (0, 0))[1]))
            elif bits > 8 and op != "tt.load":
                self.faults.append(f"{self.where(line)}: {op} is not bounded")
        limit = 2 ** (bits - 1)
        if op.startswith("arith.") and bits >= 32 and not (-limit <= result[0] and result[1] < limit):
            self.faults.append(f"{self.where(line)}: {op} in {bits} bits reaches {max(map(abs, result))}")
            result = -limit, limit - 1
        self.known[name] = result

    def result(self, op: str, rest: str, given):
        if op == "arith.constant":
            value = re.search(r"(?:dense<)?(-?\d+|true|false)>?", rest)
            if value is None:
                return None
            number = {"true": 1, "false": 0}.get(value[1])
            number = int(value[1]) if number is None else number
            return number, number
        if op == "tt.get_program_id":
            return 0, self.grid - 1
        if op == "tt.make_range":
            ends = dict(re.findall(r"(start|end) = (\d+)", rest))
            return int(ends["start"]), int(ends["end"]) - 1
        if not given:
            return None
        a, b = given[0], given[1] if len(given) > 1 else None
        match op.removeprefix("arith."):
            case "muli":
                return product(a, b)
            case "addi":
                return a[0] + b[0], a[1] + b[1]
            case "subi":
                return a[0] - b[1], a[1] - b[0]
            case "divsi":
                return quotient(a, b)
            case "remsi":
                most = max(0, b[1] - 1)
                return max(-most, min(0, a[0])), min(most, max(0, a[1]))
            case "minsi":
                return min(a[0], b[0]), min(a[1], b[1])
            case "maxsi":
                return max(a[0], b[0]), max(a[1], b[1])
            case "extsi" | "trunci":
                return a
            case "extui":  # of a byte or a bit
                return max(0, a[0]), min(255, max(1, a[1]))
            case "cmpi" | "cmpf" | "andi" | "ori" | "xori":
                return 0, 1
            case "select":
                return hull(*given[1:3])
        if op in ("tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape", "tt.trans"):
            return a
        return None

    def both_ways(self) -> dict[str, str]:
        """For each argument that is both written and read: the order of stores, loads and barriers."""
        written = {root for kind, root in self.order if kind == "S"}
        read = {root for kind, root in self.order if kind == "L"}
        orders = {}
        for root in sorted(written & read):
            kinds = "".join(kind for kind, x in self.order if kind == "B" or x == root)
            orders[root] = re.sub(r"(.)\1+", r"\1", kinds)
        return orders

    def told(self) -> dict:
        faults = sorted(set(self.faults))
        return {"faults": faults, "dots": self.products, "tf32": self.tf32, "both": self.both_ways(), "grid": self.grid}


def launches() -> dict[str, dict]:
    """What `Kernel` says of every launch in `cases`, by the kernel's name and the case's."""
    from harness import pretend_gpu
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime.jit import JITFunction

    class Found(Exception):
        """Raised where compilation has reached the intermediate code, which is its `text`."""

        text = ""

    pretend_gpu()
    add_stages, found, now = CUDABackend.add_stages, {}, []

    def stop_at_ttir(self, stages, *rest):
        add_stages(self, stages, *rest)

        def stop(module, metadata):
            reached = Found()
            reached.text = str(module)
            raise reached

        stages["ttgir"] = stop

    def launcher(self, grid):
        def launch(*args, **kwargs):
            try:
                self.warmup(*args, grid=grid, **kwargs)
            except Found as reached:
                given = dict(zip(self.arg_names, args)) | kwargs
                values = {name: x for name, x in given.items() if type(x) is int}
                name = f"{self.fn.__name__}, {now[-1]}"
                while name in found:
                    name += "'"
                found[name] = Kernel(reached.text, values, grid[0], indices(given)).told()
            else:
                raise RuntimeError("the compiler did not pass through its stages")

        return launch

    CUDABackend.add_stages, JITFunction.__getitem__ = stop_at_ttir, launcher
    for case, run in cases():
        now.append(case)
        run()
    return found


def indices(given: dict) -> dict[str, tuple[int, int]]:
    """What block-sparse attention's lists hold: places in the list, tiles of a row or column, kinds of tiles."""
    if "p_kinds" not in given:
        return {}
    entries, kinds = given["p_kinds"].numel(), given["p_masks"].shape[0]
    tiles = max(given["n"] // given["TILE_Q"], given["m"] // given["TILE_KV"])
    places = dict.fromkeys(("p_start", "p_part"), (0, entries)) | dict.fromkeys(("p_columns", "p_rows"), (0, tiles))
    return places | {"p_kinds": (-1, kinds - 1)}


def cases():
    """Launches whose tensors have more elements than 32 bits can count."""
    import torch

    from nondual.ops.flash_attention.forget import sums_of
    from nondual.ops.flash_attention.triton import launch as flash
    from nondual.ops.flash_attention.triton.tiles import splits_of
    from nondual.ops.linear_attention.triton import launch as linear
    from nondual.ops.selective_scan.triton import launch as scan
    from nondual.ops.sparse_attention.triton import launch as sparse
    from nondual.ops.ssd.triton import launch as ssd

    linear.chip_of = sparse.chip_of = ssd.chip_of = flash.chip_of = lambda device: "sm_90"
    empty = lambda *shape, dtype=torch.float32: torch.empty(*shape, dtype=dtype, device="meta")  # noqa: E731

    def attend(dtype, b, h, g, n, m, d, causal, window, gates=False):
        def run():
            q = empty(b, n, h, d, dtype=dtype).transpose(1, 2)
            k, v = (empty(b, g, m, d, dtype=dtype) for _ in range(2))
            forget = sums_of(empty(b, h, m)) if gates else None
            kept = flash.launch_forward(q, k, v, causal, window, 0.5, forget)
            flash.launch_backward(kept[0], kept[2], q, k, v, *kept, causal, window, 0.5, forget)

        return run

    def decode(dtype, b, h, g, m, d, window, gates=False):
        def run():
            q, k = empty(b, h, 4, d, dtype=dtype), empty(b, g, m, d, dtype=dtype)
            forget = sums_of(empty(b, h, m)) if gates else None
            flash.launch_decode(q, k, k, True, window, 0.5, splits_of(q, k, window), forget)

        return run

    def selective(dtype, b, length, d, n, groups, full=True):
        def run():
            u, A = empty(b, length, d, dtype=dtype), empty(d, n)
            B = empty(b, length, groups, n, dtype=dtype) if groups else A
            state, reset = empty(b, d, n), empty(b, length, dtype=torch.bool)
            rest = (A[:, 0], u, A[:, 0], True, state, reset) if full else (None, None, None, False, None, None)
            call = scan.Launcher(u, u, A, B, B, *rest)
            y, last, *saved = call.forward(save=True)
            call.backward(y, last, *saved)

        return run

    def dual(dtype, b, length, h, p, g, n, chunk):
        def run():
            x, B = empty(b, length, h, p, dtype=dtype), empty(b, length, g, n, dtype=dtype)
            rest = empty(h, p), x, empty(h), empty(b, h, p, n), empty(b, length, dtype=torch.bool)
            call = ssd.Launcher(x, x[..., 0], empty(h), B, B, *rest, True, chunk)
            _, last = call.forward()
            call.backward(x, last)

        return run

    def listed(dtype, b, h, g, n, m, d, tile, entries, masks):
        """Masks of their own for each sequence and head of keys, with so many tiles in all."""

        def lists(lines):
            start, part, across, kinds = (
                empty(*shape, dtype=torch.int32) for shape in ((b, g, lines + 1), (b, g, lines), (entries,), (entries,))
            )
            return sparse.Lists(start, part, across, kinds)

        def run():
            q = empty(b, n, h, d, dtype=dtype).transpose(1, 2)
            k, v = (empty(b, g, m, d, dtype=dtype) for _ in range(2))
            mask = sparse.Mask(lists(-(-n // tile)), lists(-(-m // tile)), empty(masks, tile, tile, dtype=torch.bool))
            out, top, total = sparse.launch_forward(q, k, v, mask, 0.5)
            sparse.launch_backward(out, total, q, k, v, out, top, total, mask, 0.5)

        return run

    def erased(dtype, b, length, h, d, width, chunk, full=True):
        """The delta rule."""

        def run():
            q, v = empty(b, length, h, d, dtype=dtype), empty(b, length, h, width, dtype=dtype)
            rest = (empty(b, h, d, width), empty(b, length, dtype=torch.bool)) if full else (None, None)
            beta = empty(b, h, length)
            call = linear.DeltaLauncher(q, q, v, empty(b, length, h) if full else None, beta, *rest, 0.5, chunk)
            out, last = call.forward()
            call.backward(out, last)

        return run

    half, single = torch.bfloat16, torch.float32
    yield "all keys", attend(half, 32, 64, 8, 131072, 131072, 128, False, 0)
    yield "causal, float32", attend(single, 32, 64, 64, 131072, 131072, 128, True, 0)
    yield "window, few heads", attend(half, 4, 2, 1, 2**22, 2**22, 256, True, 4096)
    yield "split keys", decode(half, 64, 64, 8, 2**18, 128, 0)
    yield "split keys, float32, window", decode(single, 64, 64, 8, 2**18, 128, 2**16)
    yield "forget gates", attend(half, 32, 64, 8, 2**21, 2**21, 128, True, 0, gates=True)
    yield "split keys, forget gates", decode(half, 64, 64, 8, 2**21, 128, 0, gates=True)
    yield "16 states", selective(half, 16, 65536, 8192, 16, 1)
    yield "256 states, float32", selective(single, 16, 65536, 2048, 256, 1)
    yield "many short sequences", selective(half, 16384, 64, 2048, 16, 1)
    yield "two levels", selective(half, 1, 2**23, 500, 16, 1)
    yield "two levels, B and C constant", selective(single, 1, 2**23, 500, 256, 0, full=False)
    yield "Mamba-2", dual(half, 16, 65536, 80, 64, 1, 128, 256)
    yield "Mamba-2, float32, short chunks", dual(single, 16, 65536, 80, 64, 8, 128, 16)
    yield "tiles", listed(half, 32, 64, 8, 131072, 131072, 128, 64, 2**28, 3)
    yield "tiles, float32, few and long", listed(single, 2, 2, 1, 2**23, 2**23, 256, 128, 2**27, 2**20)
    yield "delta rule", erased(half, 16, 65536, 64, 128, 128, 64)
    yield "delta rule, float32, short chunks", erased(single, 16, 2**20, 8, 128, 256, 16, full=False)


if __name__ == "__main__":
    print(json.dumps(launches()))
