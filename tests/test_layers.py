"""Imports point one way."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "suwen").rglob("*.py")) + [ROOT / "template.py"]
FOLDERS = (".", "tools")
SCRIPTS = [path for folder in FOLDERS for path in (ROOT / folder).glob("*.py") if path.name != "template.py"]
# The rooms that say what the others are, from the bottom up; every other module lies somewhere between them.
LAYERS = [
    {"template"},
    {"arguments", "command_line", "formats", "readers"},
    {"encoding", "packing", "preference", "metrics", "statistics", "head", "attention", "policy_gradient"},
    {"lineage", "rows", "manifest", "results", "checkpoint", "locking"},
    {"models", "data", "retrieval.index"},
    {"serving", "reward", "alarms"},
    {"evaluate", "api.server", "ppo"},
    {"resuming"},
    {"stage"},
    {"reinforcement"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def name_of(path: Path) -> str:
    """data, retrieval.index or benchmarks (for its __init__) for modules of suwen; else the file's own name."""
    if path.is_relative_to(ROOT / "suwen"):
        return ".".join(path.relative_to(ROOT / "suwen").with_suffix("").parts).removesuffix(".__init__")
    return path.stem


def imports(path: Path) -> set[str]:
    """Our own modules and scripts that a file imports anywhere in it, but for type checkers alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    own = {f"suwen.{name_of(module)}" for module in MODULES} | {"template"} | {script.stem for script in SCRIPTS}
    return {name.removeprefix("suwen.") for name in found & own} - {name_of(path)}


GRAPH = {name_of(path): imports(path) for path in MODULES}


def reached(name: str) -> set[str]:
    """Everything that a module imports, directly or through others."""
    found: set[str] = set()
    waiting = [name]
    while waiting:
        for other in GRAPH.get(waiting.pop(), set()) - found:
            found.add(other)
            waiting.append(other)
    return found


@pytest.mark.parametrize("name", sorted(GRAPH))
def test_a_module_does_not_import_itself_through_others(name):
    around = [other for other in GRAPH[name] if name in reached(other)]
    assert not around, f"{name} imports {around[0]}, which imports {name} in the end"


@pytest.mark.parametrize("name", sorted(LEVEL))
def test_a_room_imports_only_from_below(name):
    upward = {other for other in reached(name) if LEVEL.get(other, -1) > LEVEL[name]}
    assert not upward, f"{name} must not import {', '.join(sorted(upward))}, which lies above it"


@pytest.mark.parametrize("name", sorted(GRAPH))
def test_no_module_imports_a_script(name):
    assert not GRAPH[name] & ({script.stem for script in SCRIPTS} - set(GRAPH))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_no_script_imports_another(path):
    others = {script.stem for script in SCRIPTS} - {path.stem} - set(GRAPH)
    assert not imports(path) & others


def test_what_launchers_need_before_the_installation_is_standard_library_only():
    import sys

    plain = ("check_environment", "arguments", "command_line", "old_flags")
    for name in plain:
        tree = ast.parse((ROOT / "suwen" / f"{name}.py").read_text(encoding="utf-8"))
        top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module or "" for node in top if isinstance(node, ast.ImportFrom)}
        others = names - {f"suwen.{other}" for other in plain}
        assert {part.split(".")[0] for part in others} <= sys.stdlib_module_names
