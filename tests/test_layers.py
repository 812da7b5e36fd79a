"""Imports point one way."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the bottom up: a module imports only from layers below its own.
LAYERS = [
    {"template"},
    {
        "arguments",
        "checkpoint",
        "check_environment",
        "formats",
        "generation_settings",
        "near_duplicates",
        "personal_data",
        "phrasings",
        "readers",
        "records",
        "sampling",
    },
    {"embedded", "encoding", "knowledge_graph", "packing", "trainers"},
    {"fictional", "generation", "graph_readers", "models", "parallel", "prompts", "rows", "scoring", "synthesis"},
    {"adapters", "cleaning", "data", "mixing", "pairs"},
    {"fact_items", "merging"},
    {"composition", "serving", "stage"},
    {"data_card"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
MODULES = sorted((ROOT / "suwen").glob("*.py")) + [ROOT / "template.py"]
SCRIPTS = [path for path in [*ROOT.glob("*.py"), *ROOT.glob("tools/*.py")] if path.name != "template.py"]


def imports(path: Path) -> set[str]:
    """Our own modules that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"suwen.{alias.name}" for alias in node.names} if node.module == "suwen" else {node.module}
            found |= names
    own = {path.stem for path in MODULES} | {path.stem for path in SCRIPTS}
    return {name.removeprefix("suwen.") for name in found} & own


@pytest.mark.parametrize("path", [p for p in MODULES if p.stem != "__init__"], ids=lambda p: p.stem)
def test_a_module_imports_only_from_below(path):
    assert path.stem in LEVEL, f"{path.name} has no layer yet: give it one in this test"
    upward = {name for name in imports(path) if LEVEL.get(name, len(LAYERS)) >= LEVEL[path.stem]}
    assert not upward, f"{path.name} must not import {', '.join(sorted(upward))}"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_no_script_imports_another(path):
    assert not imports(path) & ({script.stem for script in SCRIPTS} - {path.stem})
