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
        "readers",
        "records",
        "sampling",
        "statistics",
        "metrics",
        "grams",
        "plots",
        "tables",
    },
    {
        "embedded",
        "encoding",
        "packing",
        "trainers",
        "benchmarks.task",
        "benchmarks.extraction",
        "client",
        "contamination",
    },
    {"benchmarks.choice", "benchmarks.terms", "near_duplicates"},
    {"benchmarks.exams", "benchmarks.facts", "benchmarks.free_text", "benchmarks.general_text"},
    {"benchmarks.cmexam_official"},
    {"benchmarks"},
    {"models", "parallel", "prompts", "rows", "scoring", "generation", "likelihood", "runs"},
    {"adapters", "data", "report"},
    {"merging", "comparison"},
    {"serving", "stage"},
    {"evaluate"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
MODULES = sorted((ROOT / "suwen").rglob("*.py")) + [ROOT / "template.py"]
FOLDERS = (".", "tools", "benchmarks")
SCRIPTS = [path for folder in FOLDERS for path in (ROOT / folder).glob("*.py") if path.name != "template.py"]


def name_of(path: Path) -> str:
    """data, or benchmarks.choice for a module of a package within suwen."""
    if path.is_relative_to(ROOT / "suwen"):
        return ".".join(path.relative_to(ROOT / "suwen").with_suffix("").parts).removesuffix(".__init__")
    return path.stem


def imports(path: Path) -> set[str]:
    """Our own modules that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"suwen.{alias.name}" for alias in node.names} if node.module == "suwen" else {node.module}
            found |= names
    own = {f"suwen.{name_of(path)}" for path in MODULES} | {path.stem for path in SCRIPTS} | {"template"}
    return {name.removeprefix("suwen.") for name in found & own}


@pytest.mark.parametrize("path", [p for p in MODULES if name_of(p) != "__init__"], ids=name_of)
def test_a_module_imports_only_from_below(path):
    name = name_of(path)
    assert name in LEVEL, f"{path.name} has no layer yet: give it one in this test"
    upward = {other for other in imports(path) if LEVEL.get(other, len(LAYERS)) >= LEVEL[name]}
    assert not upward, f"{path.name} must not import {', '.join(sorted(upward))}"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_no_script_imports_another(path):
    assert not imports(path) & ({script.stem for script in SCRIPTS} - {path.stem})
