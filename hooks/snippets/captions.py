"""The numbers in the words of a figure: each is computed or asserted by the code that draws it.

The words are the `alt` and the `caption` that a figure fence, or a notebook's cell, hands to figures.show,
figures.live or figures.steps. A number that the code formats into them ({share:.0%} in an f-string) was computed, and
is right. One that is typed into them was right on the day when it was typed. So the same fence must have it in an
`assert`: that stops the build on the day, or on the machine, where it is wrong.

    17 %, 0.17        need the number in an assert: assert abs(chance - 0.17) < 0.01
    three, seventy    need the number anywhere in the code: in a loop, a shape, an assert

Names with a digit in them are no numbers (float32, SmolLM2, GPT-4). The code is read here, not run.
"""

import ast
import html
import operator
import re
from collections.abc import Iterator
from pathlib import Path

from snippets.reading import cells, fences, notebooks, pages, shown

WORDS = "alt", "caption"  # the arguments that are read
SHOW = "show", "live", "steps"  # of nondual.figures; these must give both
NUMBER = re.compile(
    r"(?<![\w.])(?<![A-Za-z][-‑])(?:[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?|\.[0-9]+)(?:e-?[0-9]+)?"
    r"(?P<percent>\s?%| percent)?"
)
UNITS = "three four five six seven eight nine".split()
TEENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
SPELLED = {word: value for value, word in enumerate([*UNITS, *TEENS], 3)}
SPELLED |= {word: 10 * value for value, word in enumerate(TENS, 2)}
AFTER_TENS = {"one": 1, "two": 2} | {word: SPELLED[word] for word in UNITS}
SPELLED |= {f"{tens}-{unit}": SPELLED[tens] + value for tens in TENS for unit, value in AFTER_TENS.items()}
WORD = re.compile(rf"\b(?:{'|'.join(sorted(SPELLED, key=len, reverse=True))})\b(?!-\w+th\b)", re.IGNORECASE)
ARITHMETIC = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}


def faults(page: str | Path) -> list[str]:
    """The numbers of a page or notebook that nothing in their figure's code backs, each as 'docs/x.md:12: …'."""
    page = Path(page)
    if page.suffix == ".ipynb":
        found = ((i, line, fault) for i, code in cells(page) for line, fault in faults_of(code))
        return [f"{shown(page)}: cell {i}, line {line}: {fault}" for i, line, fault in found]
    drawn = [fence for fence in fences(page) if fence.kind == "figure"]
    return [f"{shown(page)}:{fence.line + line}: {fault}" for fence in drawn for line, fault in faults_of(fence.code)]


def faults_of(code: str) -> list[tuple[int, str]]:
    """The same of one fence's code, with lines counted in it from 1. Code that is no Python has no words of ours."""
    try:
        tree = ast.parse(code)
    except SyntaxError:
        return []
    out: list[tuple[int, str]] = []
    asserted, anywhere = numbers_asserted(tree), numbers_of(tree)
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call):
            continue
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        if ast.unparse(call.func) in {f"figures.{name}" for name in SHOW}:
            out += [
                (call.lineno, f"give {name} by its name: the numbers in it are compared with what the code asserts")
                for name in WORDS
                if name not in given
            ]
        for name in WORDS:
            for node, text in typed(given[name], tree) if name in given else ():
                text = readable(text)
                for m in NUMBER.finditer(text):
                    if not backed(m, asserted):
                        out.append((line_of(m[0], node, code), unbacked(name, m[0].strip())))
                for m in WORD.finditer(text):
                    if SPELLED[m[0].lower()] not in anywhere:
                        out.append((line_of(m[0], node, code), unbacked(name, m[0], "is nowhere in")))
    return list(dict.fromkeys(out))


def unbacked(name: str, number: str, how: str = "is in no assert of") -> str:
    return f"the {name} states {number}, which {how} the figure's code: format it from a value, or assert it there"


# --- the words -----------------------------------------------------------------------------------------------------


def typed(node: ast.AST | None, tree: ast.AST, seen: frozenset[str] = frozenset()) -> Iterator[tuple[ast.AST, str]]:
    """Each stretch of text that is typed and not computed, with the node that holds it.

    Names lead to what is assigned to them, and calls of the fence's own functions to what they return.
    """

    def inside(*nodes: ast.AST | None) -> Iterator[tuple[ast.AST, str]]:
        for each in nodes:
            yield from typed(each, tree, seen)

    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node, node.value
    elif isinstance(node, ast.JoinedStr):
        # One text, so that "0.{x}" and "{x} %" are read as written: what is computed stands in it as an ellipsis.
        parts = [
            str(part.value) if isinstance(part, ast.Constant) else constant_text(part) or "…" for part in node.values
        ]
        yield node, "".join(parts)
        yield from inside(*(part.value for part in node.values if isinstance(part, ast.FormattedValue)))
    elif isinstance(node, ast.BinOp):
        yield from inside(node.left, node.right)
    elif isinstance(node, ast.IfExp):
        yield from inside(node.body, node.orelse)
    elif isinstance(node, ast.List | ast.Tuple):
        yield from inside(*node.elts)
    elif isinstance(node, ast.ListComp | ast.GeneratorExp):
        yield from inside(node.elt)
    elif isinstance(node, ast.Call):
        yield from inside(*node.args)
        if isinstance(node.func, ast.Attribute):
            yield from inside(node.func.value)
        elif isinstance(node.func, ast.Name) and node.func.id not in seen:
            for part in ast.walk(tree):
                if isinstance(part, ast.FunctionDef) and part.name == node.func.id:
                    for end in ast.walk(part):
                        if isinstance(end, ast.Return):
                            yield from typed(end.value, tree, seen | {part.name})
    elif isinstance(node, ast.Name) and node.id not in seen:
        for part in ast.walk(tree):
            if isinstance(part, ast.Assign | ast.AugAssign | ast.AnnAssign):
                targets = part.targets if isinstance(part, ast.Assign) else [part.target]
                if any(isinstance(target, ast.Name) and target.id == node.id for target in targets):
                    yield from typed(part.value, tree, seen | {node.id})


def constant_text(part: ast.AST) -> str:
    """What a {…} of an f-string comes to where nothing in it is computed: f"{17} %" is typed as much as "17 %" is."""
    if isinstance(part, ast.FormattedValue) and (value := value_of(part.value)) is not None:
        return str(value)
    return ""


def readable(text: str) -> str:
    """The words without tags, without the addresses of links, with entities as characters."""
    text = re.sub(r"\]\([^)]*\)", "]", text)
    return html.unescape(re.sub(r"<[^>]*>", " ", text))


def line_of(number: str, node: ast.AST, code: str) -> int:
    """The first line of a text that has the number in it: one f-string may go over many lines."""
    first, last = node.lineno, node.end_lineno or node.lineno
    for line in range(first, last + 1):
        if number.strip() in code.splitlines()[line - 1]:
            return line
    return first


# --- the numbers ---------------------------------------------------------------------------------------------------


def value_of(node: ast.AST) -> float | None:
    """The value of arithmetic on typed numbers, 2 / 3 or -1; None for all else."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, int | float) and not isinstance(node.value, bool) else None
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = value_of(node.operand)
        return None if value is None else abs(value)  # a caption's sign is words: "three less", "falls by 3"
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        left, right = value_of(node.left), value_of(node.right)
        if left is None or right is None or (isinstance(node.op, ast.Pow) and abs(right) > 64):
            return None
        try:
            return ARITHMETIC[type(node.op)](left, right)
        except ArithmeticError:
            return None
    return None


def numbers_of(node: ast.AST) -> set[float]:
    """Every number that stands in code outside its strings."""
    inside_text = {id(part) for text in ast.walk(node) if isinstance(text, ast.JoinedStr) for part in ast.walk(text)}
    return {value for part in ast.walk(node) if id(part) not in inside_text and (value := value_of(part)) is not None}


def numbers_asserted(tree: ast.AST) -> set[float]:
    """Every number in an assert that could fail: one of constants alone says nothing of the figure."""
    out: set[float] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert) and any(isinstance(part, ast.Name) for part in ast.walk(node.test)):
            out |= numbers_of(node.test)
    return out


def backed(m: re.Match, asserted: set[float]) -> bool:
    """Whether a number of the words is one of those asserted; 56 % and 0.56 are the same."""
    number = m[0].removesuffix(m["percent"] or "").replace(",", "")
    value = float(number)
    same = [value / 100, value] if m["percent"] else [value, value * 100] if value < 1 else [value]
    return any(abs(one - other) <= 1e-9 * max(1.0, abs(one)) for one in same for other in asserted)


def main(arguments: list[str]) -> int:
    chosen = [Path(argument) for argument in arguments]
    found = [fault for page in chosen or [*pages(), *notebooks()] for fault in faults(page)]
    print("\n".join(found) or "every number in a figure's words is computed or asserted by its code")
    return 1 if found else 0
