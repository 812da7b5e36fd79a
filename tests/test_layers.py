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
        "network",
        "progress",
        "readers",
        "records",
        "sampling",
        "api.guard",
        "api.schema",
        "retrieval.settings",
        "retrieval.terms",
        "retrieval.office",
    },
    {"attention", "embedded", "encoding", "head", "packing", "preference"},
    {"lineage", "rows"},
    {"batches"},
    {"probe"},
    {"trainers"},
    {"models", "parallel", "prompts", "scoring", "generation"},
    {"retrieval.injection", "retrieval.bm25", "retrieval.dense"},
    {"retrieval.passages"},
    {"retrieval.documents"},
    {"retrieval.index"},
    {"retrieval.search"},
    {"adapters", "data", "retrieval.flags", "retrieval.grounding"},
    {"merging", "switching"},
    {"batching"},
    {"api.server"},
    {"serving", "stage"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
MODULES = sorted((ROOT / "suwen").rglob("*.py")) + [ROOT / "template.py"]
SCRIPTS = [path for path in [*ROOT.glob("*.py"), *ROOT.glob("tools/*.py")] if path.name != "template.py"]


def module_name(path: Path) -> str:
    """ "data" for suwen/data.py, "retrieval.index" for suwen/retrieval/index.py, "template", "inference"."""
    relative = path.relative_to(ROOT / "suwen" if path.is_relative_to(ROOT / "suwen") else path.parent)
    return ".".join(relative.with_suffix("").parts)


def imports(path: Path) -> set[str]:
    """Our own modules that a file imports, anywhere in it, except for annotations only."""
    found: set[str] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    own = {module_name(path) for path in [*MODULES, *SCRIPTS]}
    return {name.removeprefix("suwen.") for name in found} & own


@pytest.mark.parametrize("path", [p for p in MODULES if p.stem != "__init__"], ids=module_name)
def test_a_module_imports_only_from_below(path):
    name = module_name(path)
    assert name in LEVEL, f"{path.relative_to(ROOT)} has no layer yet: give it one in this test"
    upward = {other for other in imports(path) if LEVEL.get(other, len(LAYERS)) >= LEVEL[name]}
    assert not upward, f"{path.relative_to(ROOT)} must not import {', '.join(sorted(upward))}"


@pytest.mark.parametrize("path", SCRIPTS, ids=module_name)
def test_no_script_imports_another(path):
    assert not imports(path) & ({module_name(script) for script in SCRIPTS} - {module_name(path)})
