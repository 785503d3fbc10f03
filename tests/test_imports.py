"""The import order of the design: a module imports only from its own row or rows above it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROWS = (
    ("errors", "records", "validation"),
    ("config",),
    ("data",),
    ("parallel",),
    ("models",),
    ("objectives",),
    ("rollout",),
    ("train",),
    ("experiment",),
    ("evaluate", "logprobs", "score", "generate", "convert", "plan", "report", "serve"),
    ("cli",),
)
ORDER = {name: row for row, names in enumerate(ROWS) for name in names}
FILES = sorted((ROOT / "posttrain").rglob("*.py"))


def imported(tree: ast.AST) -> set[str]:
    """Names of the package's top-level modules that a file imports, wherever the import stands."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where a module stands"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("posttrain.") and name.split(".")[1] in ORDER}


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_only_from_rows_above(file: Path) -> None:
    top = file.relative_to(ROOT / "posttrain").parts[0].removesuffix(".py")
    tree = ast.parse(file.read_text())
    if top == "__init__":
        assert imported(tree) == set()
        return
    assert top in ORDER, f"{top} has no place in the import order"
    below = {name for name in imported(tree) if ORDER[name] > ORDER[top]}
    assert not below, f"{file.name} imports from below: {below}"


@pytest.mark.parametrize("file", [f for f in FILES if f.name == "__init__.py" and f.parent.name != "posttrain"])
def test_package_files_are_empty(file: Path) -> None:
    assert file.read_text() == ""
