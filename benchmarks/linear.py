"""Linear attention on a GPU: sums, decayed sums and the delta rule, against fla-core's kernels.

Every case times ours and fla-core's in turn, round by round, and keeps the ratio of the rounds: the card is shared and
its clock moves. Both get the same tensors (B, N, H, ·) in bfloat16, as a module's projections lie in memory. Beside
each case stands the share of this card's measured copy bandwidth at which the inputs and outputs alone would pass.
--quick takes two lengths alone.
"""

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ceilings import ceilings, seconds
from benchmarks.record import ratio, write
from nondual.ops.linear_attention import Impl, linear_attention

TOKENS = 16384  # in a batch, whatever the length
SIZES = {"64": (32, 64, 64), "128": (16, 128, 128), "256": (8, 256, 256)}  # H, D, Dv: 2,048 channels in each
LENGTHS = (512, 2048, 8192, 16384)
PEERS = {  # fla-core's module and function for each form
    "sum": ("linear_attn", "chunk_linear_attn"),
    "decayed": ("simple_gla", "chunk_simple_gla"),
    "delta": ("delta_rule", "chunk_delta_rule"),
    "gated delta": ("gated_delta_rule", "chunk_gated_delta_rule"),
}
FORMS = tuple(PEERS)


def drawn(
    form: str, batch: int, length: int, heads: int, d: int, v: int, device: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The tensors of a form by name, (B, N, H, ·) and (B, N, H): keys of length 1, gates near 1."""
    draw = torch.Generator().manual_seed(0)
    q, k, values = (torch.randn(batch, length, heads, width, generator=draw) for width in (d, d, v))
    given = {"q": q, "k": F.normalize(k, dim=-1), "v": values}
    if form != "sum" and form != "delta":
        given["log_decay"] = F.logsigmoid(torch.randn(batch, length, heads, generator=draw) + 3)
    if "delta" in form:
        given["beta"] = torch.randn(batch, length, heads, generator=draw).sigmoid()
    wide = {"log_decay"}  # fla-core wants the decay in float32
    return {name: x.to(device, torch.float32 if name in wide else dtype).requires_grad_() for name, x in given.items()}


def ours(given: dict[str, Tensor], impl: Impl = "triton"):
    """Outputs (B, N, H, Dv) and the last state, by our door."""
    turned: dict[str, Any] = {name: x.transpose(1, 2) for name, x in given.items()}
    out, state = linear_attention(**turned, scale=given["q"].shape[-1] ** -0.5, impl=impl)
    return out.transpose(1, 2), state


def theirs(form: str):
    """fla-core's function of a form, of the same tensors.

    Raises:
        ImportError: fla-core is not installed.
    """
    module, name = PEERS[form]
    function: Any = getattr(importlib.import_module(f"fla.ops.{module}"), name)
    more = {"normalize": False} if form == "sum" else {}
    others = {"log_decay": "g", "beta": "beta"}

    def run(given: dict[str, Tensor]):
        named = {others.get(key, key): x for key, x in given.items()}
        return function(**named, **more, output_final_state=True)

    return run


def look(form: str, device: str = "cpu", dtype: torch.dtype = torch.float32, length: int = 37) -> dict[str, float]:
    """How far our kernels are from plain torch in float64, as a share of the largest number: outputs, last state and
    every gradient by name. Small, so that Triton's interpreter can do it too."""
    given = drawn(form, 1, length, 2, 16, 16, device, dtype)
    exact = {name: x.detach().double().requires_grad_() for name, x in given.items()}
    found = []
    for tensors, (out, state) in ((given, ours(given)), (exact, ours(exact, "chunked"))):
        grads = torch.autograd.grad((out.sin().sum(), state.sin().sum()), list(tensors.values()))
        found.append({"out": out, "state": state} | {f"d{name}": x for name, x in zip(tensors, grads)})
    near, true = ({name: x.detach() for name, x in results.items()} for results in found)
    return {name: float((near[name] - x).abs().max() / x.abs().max()) for name, x in true.items()}


def measure(form: str, size: str, length: int, limits: dict, backward: bool) -> dict:
    """One case: ours beside fla-core's."""
    heads, d, v = SIZES[size]
    batch = max(1, TOKENS // length)
    given = drawn(form, batch, length, heads, d, v, "cuda", torch.bfloat16)
    truth = ours(given)[0].detach().float()
    incoming = torch.randn_like(truth).bfloat16()
    runs, refused = {}, {}
    for peer, forward in {"ours": ours, "fla": theirs(form)}.items():
        try:
            out, _ = forward(given)
            error = ((out.float() - truth).norm() / truth.norm()).item()
            if error > 0.02:
                raise RuntimeError(f"another result, off by {error:.3f} of its norm")
            if backward:
                runs[peer] = lambda out=out: torch.autograd.grad(out, list(given.values()), incoming, retain_graph=True)
            else:
                runs[peer] = lambda forward=forward: forward(given)
            runs[peer]()
        except Exception as error:  # a peer says no in many ways; which, is part of the table
            runs.pop(peer, None)
            refused[peer] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
    times = {peer: [] for peer in runs}
    for _ in range(7):
        for peer, run in runs.items():
            times[peer] += seconds(run)
    best = min(times["ours"])
    moved = sum(x.numel() * x.element_size() for x in given.values()) + given["v"].numel() * 2
    moved = moved * 2 if backward else moved  # with the gradients of all of them
    return {
        "form": form, "heads": heads, "d": d, "dv": v, "length": length, "batch": batch, "backward": backward,
        "ours_ms": round(best * 1e3, 4),
        "share_of_copy": round(moved / best / 1e9 / limits["copy_gbs"], 3),
        "speedup_over": {peer: ratio(taken, times["ours"]) for peer, taken in times.items() if peer != "ours"},
        "refused": refused,
    }  # fmt: skip


def main(options: list[str]) -> None:
    """Write docs/measured/linear.json, or say what is missing."""
    if not torch.cuda.is_available():
        print("linear: passed over; it needs a CUDA device")
        return
    try:
        theirs("sum")
    except ImportError as error:
        print(f"linear: passed over; it needs fla-core, pip install fla-core==0.6.* ({error})")
        return
    limits, rows = ceilings(), []
    worst = {form: max(look(form, "cuda", torch.float32, 300).values()) for form in FORMS}
    for backward in (False, True):
        for form in FORMS:
            for size in SIZES:
                for length in LENGTHS:
                    if "--quick" in options and length not in (2048, 8192):
                        continue
                    rows.append(measure(form, size, length, limits, backward))
                    print(rows[-1], flush=True)
                    torch.cuda.empty_cache()
    command = " ".join(["nox -s bench -- linear", *options])
    figures = {"ceilings": limits, "float32_error": worst, "rows": rows}
    write("linear", command, figures, device="cuda", dtype="bfloat16", tokens=TOKENS)
