"""What the essay's own files hold: how much is text, and whether anything is computed.

To count again, with DIR a clone of github.com/r-baldridge/consciousness at the commit that the file names:

    nox -s bench -- essay_codebase --checkout=DIR

Without DIR the benchmark is passed over: nothing is fetched. The files are read and never run.
"""

import ast
import subprocess
from pathlib import Path

from benchmarks.record import write

PATHS = (
    "attention_mechanism",
    "self_attention",
    "transformer",
    "positional_encoding",
    "efficient_attention/flash_attention",
    "efficient_attention/sparse_attention",
    "efficient_attention/linear_attention",
    "efficient_attention/mamba",
    "vision_transformers/vit",
    "multimodal/clip",
    "multimodal/flamingo",
    "multimodal/llava",
    "language_models/gpt_family",
)
ARITHMETIC = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow, ast.MatMult, ast.FloorDiv)


def count(source: str) -> dict[str, float]:
    """How long a Python source is, which share of it is strings, and how many functions and arithmetic signs it has.

    Arithmetic that is written inside a string is text: only what Python would compute counts.
    """
    nodes = list(ast.walk(ast.parse(source)))
    text = sum(len(n.value) for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str))
    return {
        "characters": len(source),
        "text_share": round(text / len(source), 2),
        "functions": sum(isinstance(n, ast.FunctionDef) for n in nodes),
        "arithmetic": sum(isinstance(n, ast.BinOp) and isinstance(n.op, ARITHMETIC) for n in nodes),
    }


def main(options: list[str]) -> None:
    checkout = next((word.split("=", 1)[1] for word in options if word.startswith("--checkout=")), None)
    if checkout is None:
        print("essay_codebase: passed over; give --checkout=DIR, a clone of github.com/r-baldridge/consciousness")
        return
    rows = [{"path": f"ml_research/attention/{path}.py"} for path in PATHS]
    for row in rows:
        row |= count((Path(checkout) / row["path"]).read_text())
    command = ["git", "-C", checkout, "rev-parse", "HEAD"]
    head = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    write(
        "essay_codebase",
        "nox -s bench -- essay_codebase --checkout=DIR",
        {"rows": rows},
        repository="https://github.com/r-baldridge/consciousness",
        repository_commit=head.stdout.strip(),
    )
