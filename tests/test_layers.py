"""The table of design.md §2: who may import whom, imports inside functions included."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "src" / "tunesmith"

L0 = {"errors", "types"}
L1 = {"config", "io", "ops"}
L2_TO_L4 = {"data", "model", "objectives", "infer", "engine", "evaluate", "export", "rollout"}
EVERYTHING = L0 | L1 | L2_TO_L4 | {"goal", "job", "overview", "reference_pass", "results", "train"}

# Part -> parts it may import; an entry with a dot allows that module alone.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "types": set(),
    "config": L0,
    "io": L0,
    "ops": L0,
    "data": L0 | L1,
    "model": L0 | L1,
    "objectives": L0 | {"ops"},
    "infer": L0 | {"ops", "model", "config"},
    "engine": L0 | L1 | {"objectives.base", "data.loader"},
    "rollout": L0 | L1 | {"data", "objectives", "infer", "engine"},
    "evaluate": L0 | L1 | {"objectives.base", "data", "infer"},
    "export": L0 | L1 | {"objectives.base", "model"},
    "job": EVERYTHING - {"goal", "overview", "reference_pass", "results", "train"},
    "goal": EVERYTHING - {"overview", "reference_pass", "results", "train"},
    "results": EVERYTHING - {"overview", "reference_pass", "train"},
    "overview": EVERYTHING - {"reference_pass", "results", "train"},
    "reference_pass": EVERYTHING - {"overview", "train"},
    "train": EVERYTHING,
    "sweep": EVERYTHING,
    "serve": EVERYTHING,
    "cli": EVERYTHING | {"serve", "sweep", "__init__"},
    "__init__": EVERYTHING,
    "__main__": {"cli"},
}
NO_TORCH = {"errors", "config", "io"}
NO_TORCH_EXCEPTIONS = {"io/safeload.py"}


def imports(file: Path) -> list[tuple[str, bool]]:
    """(module, stands under TYPE_CHECKING) of every import in a file."""
    found: list[tuple[str, bool]] = []

    def visit(node: ast.AST, typing_only: bool) -> None:
        for child in ast.iter_child_nodes(node):
            inside = typing_only or (
                isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
            )
            if isinstance(child, ast.Import):
                found.extend((alias.name, inside) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{file}: relative import"
                module = child.module or ""
                if module == "tunesmith":
                    found.extend((f"tunesmith.{alias.name}", inside) for alias in child.names)
                else:
                    found.append((module, inside))
            else:
                visit(child, inside)

    visit(ast.parse(file.read_text(encoding="utf-8")), False)
    return found


def part_of(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


FILES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_keep_to_the_layers(file: Path) -> None:
    part = part_of(file)
    assert part in ALLOWED, f"{part} has no place in the table"
    for module, typing_only in imports(file):
        root, _, rest = module.partition(".")
        if root == "tunesmith":
            target = rest.split(".")[0]
            if not (ROOT / target).exists() and not (ROOT / f"{target}.py").exists():
                target = "__init__"  # a name of the package itself, such as __version__
            allowed = ALLOWED[part]
            is_fine = (
                target in allowed or target == part or any(rest.startswith(a) for a in allowed)
            )
            assert is_fine, f"{part} imports {module}"
        elif root == "torch" and not typing_only:
            name = file.relative_to(ROOT).as_posix()
            assert part not in NO_TORCH or name in NO_TORCH_EXCEPTIONS, f"{name} imports torch"


def test_nothing_unpickles_or_runs_text() -> None:
    forbidden = ("pickle.load", "torch.load", "yaml.load(", "extractall", "shell=True")
    for file in FILES:
        text = file.read_text(encoding="utf-8")
        for name in forbidden:
            assert name not in text or file.name == "safeload.py", f"{file.name}: {name}"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in {"eval", "exec"}, f"{file.name} calls {node.func.id}"
