"""The shape of the library: imports point inward, nothing needs triton or a GPU to be imported, and it is quick to."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SRC = ROOT / "src"

# Inward is down: a module imports from its own rank or from lower ones.
RANKS = {
    "store": 0,
    "data": 1,
    "ops": 0,
    "token_ids": 1,
    "weights": 1,
    "tokenization": 1,
    "chunking": 1,
    "losses": 1,
    "mixers": 1,
    "kv_cache": 1,
    "attention_mechanism": 3,
    "self_attention": 1,
    "positional_encoding": 1,
    "relative_positions": 1,
    "recurrent": 1,
    "efficient_attention": 1,
    "feed_forward": 1,
    "residual": 1,
    "connections": 1,
    "transformer_layer": 2,
    "transformer": 2,
    "decoder": 2,
    "vision_transformers": 3,
    "multimodal": 3,
    "language_models": 3,
    "search": 3,
    "encoder_decoder": 3,
    "recent": 3,
    "pretrained": 3,
    "extensions": 4,
    "analysis": 4,
    "parallel": 4,
}
ASIDE = {"tasks", "figures", "training"}  # for experiments and pages: they import none of the above, nor does it them
NOT_OURS = {"docs", "tests", "hooks", "benchmarks"}


def modules() -> dict[str, Path]:
    """Every module of the library by its dotted name."""
    names = {}
    for file in sorted((SRC / "nondual").rglob("*.py")):
        parts = file.relative_to(SRC).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return names


MODULES = modules()


def imports(name: str) -> list[tuple[str, int]]:
    """What a module imports anywhere in it, by absolute dotted name, with the line."""
    file, found = MODULES[name], []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name.split(".") if file.stem == "__init__" else name.split(".")[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                found.append((whole if whole in MODULES else base, node.lineno))
    return found


def part(name: str) -> str:
    """The part of the library that a module belongs to: nondual.ops.masks belongs to ops."""
    return name.split(".")[1] if "." in name else ""


# --- the arrows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_inward(name):
    assert part(name) in {*RANKS, *ASIDE, ""}, f"give {name} its rank in {Path(__file__).name}"
    for other, line in imports(name):
        where = f"{MODULES[name].relative_to(ROOT)}:{line}: {name} imports {other}"
        assert other.split(".")[0] not in NOT_OURS, where
        if other.split(".")[0] != "nondual" or not part(name) or not part(other):
            continue
        if part(name) in RANKS:
            assert part(other) in RANKS, f"{where}, which stands aside"
            assert RANKS[part(other)] <= RANKS[part(name)], f"{where}, which lies further out"
        else:
            assert part(other) in ASIDE, where


def test_no_two_modules_import_each_other():
    edges = {name: {other for other, _ in imports(name) if other in MODULES and other != name} for name in MODULES}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " imports ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for other in edges[name]:
                if not name.startswith(other + "."):  # a package may import its parts
                    visit(other, (*trail, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())


def of_triton(name: str) -> bool:
    """Whether a module is Triton's side of an operation: ops.ssd.triton and every module in it."""
    return "triton" in name.split(".")


# Block-sparse attention is flash attention over listed tiles, so its kernels are made of the same steps. Linear
# attention without the delta rule is the scan of state space duality with other names, and runs on its kernels.
BUILT_ON = {
    "nondual.ops.sparse_attention.triton": "nondual.ops.flash_attention.triton",
    "nondual.ops.linear_attention.triton": "nondual.ops.ssd.triton",
}


def test_a_kernel_imports_torch_and_triton_alone():
    """And its own package, the one it is built on, and what every kernel's host side shares."""
    known = {"torch", "triton", "math", "typing", "weakref"}
    for name in filter(of_triton, MODULES):
        package = name[: name.index(".triton") + len(".triton")]
        for other, line in imports(name):
            own = any(other.startswith(f"{x}.") for x in (package, BUILT_ON.get(package, package)))
            ours = own or other == "nondual.ops.kernels"
            assert ours or other.split(".")[0] in known, f"{name}:{line} imports {other}"


# --- importing -----------------------------------------------------------------------------------------------------

BLOCK_TRITON = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ImportError("triton is blocked")

sys.meta_path.insert(0, Block())
"""


def python(code: str, **more: str) -> str:
    env = os.environ | {"PYTHONPATH": str(SRC)} | more
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_everything_imports_without_triton_and_without_a_gpu():
    names = [name for name in MODULES if not of_triton(name)]
    code = BLOCK_TRITON + f"import importlib\nfor name in {names}:\n    importlib.import_module(name)\n"
    python(code + "assert 'triton' not in sys.modules\n", CUDA_VISIBLE_DEVICES="")


def test_importing_leaves_the_interpreter_s_hooks_alone():
    """An error is shown as the user's own program has it shown."""
    hooks = "sys.excepthook, sys.unraisablehook, sys.displayhook, sys.breakpointhook, threading.excepthook"
    names = [name for name in MODULES if not of_triton(name)]
    python(
        f"import importlib, sys, threading, torch\nbefore = {hooks}\n"
        f"for name in {names}:\n    importlib.import_module(name)\nassert ({hooks}) == before\n"
        "assert sys.excepthook is sys.__excepthook__"
    )


def test_importing_takes_under_twice_the_time_of_torch():
    names = ["nondual", "nondual.self_attention", "nondual.transformer", "nondual.pretrained"]
    code = (
        "from time import process_time as now\na = now()\nimport torch\nb = now()\n"
        f"import {', '.join(names)}\nprint((now() - a) / (b - a))"
    )
    python(code)  # once, so that bytecode and the disk's cache are warm
    assert min(float(python(code)) for _ in range(3)) < 2  # of processor time, for a busy machine


def test_importing_the_package_imports_the_standard_library_at_most():
    code = "import sys\nbefore = set(sys.modules)\nimport nondual\nprint(*sorted(set(sys.modules) - before))"
    assert {name.split(".")[0] for name in python(code).split()} <= {"nondual", *sys.stdlib_module_names}


def test_every_name_of_the_package_is_found_when_it_is_asked_for():
    code = (
        "import nondual\n"
        "for name in nondual.__all__:\n"
        "    value = getattr(nondual, name)\n"
        "    home = getattr(value, '__module__', value.__name__)\n"
        "    assert home.startswith('nondual.') and value.__name__.split('.')[-1] == name, (name, home)\n"
        "assert set(nondual.__all__) <= set(dir(nondual)) and 'torch' not in dir(nondual)\n"
        "try:\n    nondual.atention\n"
        "except AttributeError as error:\n    print(error)\n"
    )
    assert python(code, CUDA_VISIBLE_DEVICES="").strip() == "module 'nondual' has no attribute 'atention'"


def test_all_of_the_package_lists_what_a_type_checker_sees_and_names_every_public_module():
    tree = ast.parse(MODULES["nondual"].read_text(encoding="utf-8"))
    (block,) = [n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    seen = [alias.name for node in block.body for alias in node.names]
    (listed,) = [n for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"]
    assert sorted(seen) == sorted(ast.literal_eval(listed.value))
    told = ast.get_docstring(tree) or ""
    for name in {part(name) for name in MODULES} - {"", "store"}:
        assert name in told and name in seen, f"nondual.{name} is missing in nondual/__init__.py"


# --- what a reader finds -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODULES)
def test_what_is_public_says_what_it_is(name):
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    if tree.body:
        assert ast.get_docstring(tree), f"{name} does not say what it is"
    for node in tree.body:
        if any(isinstance(x, ast.Name) and x.id == "overload" for x in getattr(node, "decorator_list", [])):
            continue  # a signature alone: the function after it has the docstring
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), (
                f"{MODULES[name].relative_to(ROOT)}:{node.lineno}: {node.name} has no docstring"
            )


def stems() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in MODULES:
        found.setdefault(name.split(".")[-1], []).append(name)  # a package goes by the name of its folder
    return found


def test_a_chapter_shares_its_stem_with_a_module_and_a_test():
    chapters = ROOT / "docs/essay"
    for chapter in sorted(chapters.glob("*.md")):
        stem = chapter.stem
        if stem.endswith("_texts"):  # what the texts say: it computes nothing, and serves one chapter or several
            beside = (chapters / f"{stem.removesuffix('_texts')}.md").is_file()
            links = [page for page in chapters.glob("*.md") if f"({chapter.name}" in page.read_text(encoding="utf-8")]
            assert beside or len(links) > 1, f"{chapter.name}: no chapter beside it, nor two that link to it"
            continue
        compares = (ROOT / f"benchmarks/{stem}.py").is_file()  # a chapter on several mechanisms has a benchmark instead
        module = any(part(name) != "ops" for name in stems().get(stem, []))
        sums_up = "docs/ledger/" in chapter.read_text(encoding="utf-8")  # what all others found
        assert module or compares or sums_up, f"{chapter.name}: no module of that stem, nor a benchmark, nor the ledger"
        assert list((ROOT / "tests").rglob(f"test_{stem}.py")), f"{chapter.name}: no tests/test_{stem}.py"


def test_a_companion_has_a_test_of_its_name():
    for chapter in sorted((ROOT / "docs/companions").glob("*.md")):
        stem = chapter.stem.removesuffix("_texts")
        assert (ROOT / f"tests/companions/test_{stem}.py").is_file(), (
            f"{chapter.name}: no tests/companions/test_{stem}.py"
        )


def needs_a_test(file: Path) -> bool:
    """Every module does, but for an __init__.py that only imports, at once or when it is asked for a name."""
    if file.stem != "__init__":
        return True
    body = ast.parse(file.read_text(encoding="utf-8")).body
    defined = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    return bool(defined - {"__getattr__", "__dir__"})


def places_of_test(file: Path) -> list[Path]:
    """Where the test of a module may be, from the root: at the module's own path, tests/ in place of src/nondual/.

    A package with functions of its own is tested beside its folder. What is inside an operation's folder may be tested
    with the operation, as ops/ssd/triton/forward.py in tests/ops/test_ssd.py or tests/ops/test_ssd_triton.py.
    """
    path = file.relative_to(SRC / "nondual")
    if path.stem == "__init__":
        path = path.parent
    places = [path.with_name(f"test_{path.stem}.py")]
    if path.parts[0] == "ops" and len(path.parts) > 2:
        operation, inner = path.parts[1], Path(path.parts[2]).stem
        places += [Path(f"ops/test_{operation}_{inner}.py"), Path(f"ops/test_{operation}.py")]
    return [Path("tests") / place for place in places]


@pytest.mark.parametrize("name", [name for name in MODULES if needs_a_test(MODULES[name])])
def test_a_module_has_a_test_at_its_own_path(name):
    places = places_of_test(MODULES[name])
    assert any((ROOT / place).exists() for place in places), f"{name}: there is no {places[0]}"


def test_a_test_elsewhere_of_the_same_name_is_not_the_modules_own():
    def places(path):
        return [place.as_posix() for place in places_of_test(SRC / "nondual" / path)]

    assert places("language_models/mamba.py") == ["tests/language_models/test_mamba.py"]
    assert places("pretrained/__main__.py") == ["tests/pretrained/test___main__.py"]
    assert places("ops/ssd/__init__.py") == ["tests/ops/test_ssd.py"]
    assert places("ops/ssd/triton/forward.py") == [
        "tests/ops/ssd/triton/test_forward.py",
        "tests/ops/test_ssd_triton.py",
        "tests/ops/test_ssd.py",
    ]
