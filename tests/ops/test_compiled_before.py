"""What a benchmark has compiled before is not compiled again, until something changes that the result depends on."""

import json

KERNEL = """
import triton
import triton.language as tl
from benchmarks.compiled import Case

@triton.jit
def twice(x, BLOCK: tl.constexpr):
    at = x + tl.arange(0, BLOCK)
    tl.store(at, {factor} * tl.load(at))

def cases(target, brief):
    for block in (64, 128):
        yield Case(f"twice {{block}}", twice, {{"x": "*fp32"}}, {{"BLOCK": block}}, 4, 1)
"""

RUNS = """
import contextlib, importlib, io, json, sys
from pathlib import Path
from benchmarks import aot, compiled

sys.path.insert(0, sys.argv[1])
known, compile_for, names = Path(sys.argv[1], "known.json"), aot.compile_for, []
aot.compile_for = lambda *given: names.append(given[2]) or compile_for(*given)

def run(module, sample):
    compiled.SAMPLE = sample
    names.clear()
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        compiled.main("twice", importlib.import_module(module).cases, lambda case: {"warps": case.warps},
                      ["--keep", f"--known={known}"], targets=("sm_90",))
    return [len(names), json.loads(said.getvalue())]

runs = [run("two", 0), run("two", 0), run("two", 256)]
rows = json.loads(known.read_text())
known.write_text(json.dumps({key: row | {"registers": 99} for key, row in rows.items()}))
runs += [run("two", 256), run("three", 0)]
print(json.dumps(runs))
"""


def test_what_is_known_is_not_compiled_again_until_it_changes(compiled_alone, tmp_path):
    for name, factor in (("two", 2), ("three", 3)):
        (tmp_path / f"{name}.py").write_text(KERNEL.format(factor=factor))
    first, again, sampled, wrong, other = json.loads(compiled_alone("-c", RUNS, tmp_path))
    assert [first[0], again[0], sampled[0], wrong[0], other[0]] == [2, 0, 2, 2, 2]
    assert first[1] == again[1] == sampled[1]
    assert all(row["sm_90"].items() >= {"warps": 4, "spills": 0}.items() for row in first[1].values())
    assert all("and the compiler now says" in row["sm_90"]["error"] for row in wrong[1].values())
    assert not any("error" in row["sm_90"] for row in other[1].values())
