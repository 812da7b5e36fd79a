"""Imports point one way."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the bottom up: a module imports only from layers below its own.
LAYERS = [
    {"template"},
    {
        "architectures",
        "arguments",
        "checkpoint",
        "check_environment",
        "formats",
        "generation_settings",
        "lora_targets",
        "memory",
        "readers",
        "records",
        "sampling",
    },
    {"embedded", "encoding", "packing", "trainers"},
    {"conversion"},
    {"models", "parallel", "prompts", "rows", "scoring", "generation"},
    {"adapters", "data", "vocabulary"},
    {"merging"},
    {"serving", "stage"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
MODULES = sorted((ROOT / "suwen").rglob("*.py")) + [ROOT / "template.py"]
SCRIPTS = [path for path in [*ROOT.glob("*.py"), *ROOT.glob("tools/*.py")] if path.name != "template.py"]


def room(path: Path) -> str:
    """The name of a module, and of the package for the modules of a package."""
    return path.parent.name if path.parent.parent == ROOT / "suwen" else path.stem


def imports(path: Path) -> set[str]:
    """Our own modules and packages that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"suwen.{alias.name}" for alias in node.names} if node.module == "suwen" else {node.module}
            found |= names
    own = {room(path) for path in MODULES} | {path.stem for path in SCRIPTS}
    return {name.removeprefix("suwen.").split(".")[0] for name in found} & own


@pytest.mark.parametrize("path", [p for p in MODULES if p.parent / p.stem != ROOT / "suwen" / "__init__"], ids=room)
def test_a_module_imports_only_from_below(path):
    name = room(path)
    assert name in LEVEL, f"{path.name} has no layer yet: give it one in this test"
    upward = {other for other in imports(path) - {name} if LEVEL.get(other, len(LAYERS)) >= LEVEL[name]}
    assert not upward, f"{path.name} must not import {', '.join(sorted(upward))}"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_no_script_imports_another(path):
    assert not imports(path) & ({script.stem for script in SCRIPTS} - {path.stem})
