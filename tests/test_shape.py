"""The measures of style.md: sizes of files and functions, typed signatures, train.py's length."""

import ast
import statistics
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "src" / "tunesmith").rglob("*.py"))

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions() -> list[tuple[str, Function]]:
    return [
        (f"{file.relative_to(ROOT)}:{node.lineno} {node.name}", node)
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, Function)
    ]


def length(node: Function) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def test_files_are_short() -> None:
    sizes = {
        str(file.relative_to(ROOT)): len(file.read_text(encoding="utf-8").splitlines())
        for file in FILES
    }
    assert {name: size for name, size in sizes.items() if size > 450} == {}
    assert sizes["src/tunesmith/train.py"] <= 150
    assert len((ROOT / "examples" / "minimal_sft.py").read_text().splitlines()) <= 120


def test_functions_are_short() -> None:
    lengths = {name: length(node) for name, node in functions()}
    assert {name: size for name, size in lengths.items() if size > 80} == {}
    ordered = sorted(lengths.values())
    assert statistics.median(ordered) <= 10
    assert ordered[int(0.9 * len(ordered))] <= 35


def test_few_positional_parameters() -> None:
    # torch calls an autograd.Function's forward with positions; typer makes options of parameters.
    exempt = {"forward", "chat"}
    many = {
        name: len(node.args.args)
        for name, node in functions()
        if len(node.args.args) > 6 and node.name not in exempt
    }
    assert many == {}
