"""Who may import whom, read from the sources with `ast`. A module imports only from the rows above its own."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "emosteer"

#: Rows of modules that know nothing of each other; each may import those of the rows above it, also inside functions.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("__init__",),
    ("errors",),
    ("sites", "files", "dial", "workers"),
    ("jsonl", "progress", "tables", "scenarios"),
    ("prompts", "openai", "store", "artifacts"),
    ("briefs", "folders", "conversion", "gathering"),
    ("authoring", "packages"),
    ("weights",),
    ("shapes", "devices", "taps", "trie", "packed", "tokens"),
    ("model",),
    ("interventions", "activations"),
    ("contrast",),
    ("directions",),
    ("extract", "attribution"),
    ("verification", "steering", "cache"),
    ("native",),
    ("lean",),
    ("graphs",),
    ("engines",),
    ("generation", "naming", "circuit", "fluency"),
    ("gains",),
    ("ablation", "assembly", "writing"),
    ("scores", "own_replies", "judging"),
    ("embedded_judge",),
    ("soundness",),
    ("judge_training",),
    ("hf_judge", "judge_questions"),
    ("openai_judge",),
    ("judges",),
    ("resampling", "controls", "contest", "jury", "standings"),
    ("measures", "trials"),
    ("choosing",),
    ("evaluation", "calibration", "probing"),
    ("tuning",),
    ("pipeline", "summaries"),
    ("report",),
    ("export", "serve", "vllm_worker", "vllm_process"),
    ("vllm_engine",),
    ("options",),
    (
        "cli_build",
        "cli_stages",
        "cli_generate",
        "cli_judge",
        "cli_calibrate",
        "cli_evaluate",
        "cli_models",
        "cli_report",
        "cli_serve",
        "cli_export",
    ),
    ("cli",),
    ("__main__", "demo"),
)
ROW = {name: index for index, row in enumerate(LAYERS) for name in row}

#: Modules that are imported where --help must be instant, or that have no use for tensors; what they import counts as well.
LIGHT = (
    "errors",
    "sites",
    "files",
    "jsonl",
    "scenarios",
    "prompts",
    "progress",
    "workers",
    "weights",
    "authoring",
    "cli",
    "__init__",
    "__main__",
)
HEAVY = {"torch", "transformers", "transformer_lens", "safetensors", "tokenizers", "accelerate", "sentence_transformers"}
#: Modules that run whatever code a file holds.
UNSAFE = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


@dataclass(frozen=True)
class Import:
    """One imported module. kind: "module" (runs on import), "function" (runs when called) or "typing" (never runs)."""

    module: str
    names: tuple[str, ...]
    kind: str
    line: int


def imports_of(tree: ast.Module) -> Iterator[Import]:
    """Every import, wherever it stands."""

    def walk(node: ast.AST, kind: str) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(alias.name, (), kind, child.lineno) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"line {child.lineno}: imports are absolute in this package"
                yield Import(child.module or "", tuple(alias.name for alias in child.names), kind, child.lineno)
            elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                yield from walk(child, kind if kind == "typing" else "function")
            elif isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
                for part in child.body:
                    yield from walk(ast.Module([part], []), "typing")
                for part in child.orelse:
                    yield from walk(ast.Module([part], []), kind)
            else:
                yield from walk(child, kind)

    return walk(tree, "module")


def name_of(path: Path) -> str:
    """The module's name below the package: `model`, or `serve` for everything in a folder `serve`."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def own(found: Import) -> list[str]:
    """The modules of this package that an import names."""
    if found.module == "emosteer":
        return [name if name in ROW or (PACKAGE / f"{name}.py").exists() else "__init__" for name in found.names] or ["__init__"]
    return [found.module.split(".")[1]] if found.module.startswith("emosteer.") else []


SOURCES = sorted(path for path in PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8"), str(path)) for path in SOURCES}
IMPORTS = [(path, name_of(path), found) for path in SOURCES for found in imports_of(TREES[path])]


def where(path: Path, found: Import) -> str:
    return f"{path.relative_to(PACKAGE.parent)}:{found.line}"


# ---- the walker itself ---------------------------------------------------------------------------------------------------------


def test_the_walker_tells_apart_when_an_import_runs() -> None:
    source = (
        "import a.b\n"
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from c import d\nelse:\n    import e\n"
        "try:\n    import f\nexcept ImportError:\n    import g\n"
        "class K:\n    import h\n    def m(self):\n        if TYPE_CHECKING:\n            import i\n        from emosteer import j, k\n"
        "async def n():\n    with x:\n        import l\n"
    )
    found = [(i.module, i.names, i.kind) for i in imports_of(ast.parse(source))]
    assert found == [
        ("a.b", (), "module"),
        ("typing", ("TYPE_CHECKING",), "module"),
        ("c", ("d",), "typing"),
        ("e", (), "module"),
        ("f", (), "module"),
        ("g", (), "module"),
        ("h", (), "module"),
        ("i", (), "typing"),
        ("emosteer", ("j", "k"), "function"),
        ("l", (), "function"),
    ]
    assert own(Import("emosteer", ("artifacts", "__version__"), "module", 1)) == ["artifacts", "__init__"]
    assert own(Import("emosteer.sites", ("Z",), "module", 1)) == ["sites"] and own(Import("torch.nn", (), "module", 1)) == []
    assert len(SOURCES) > 20 and len(IMPORTS) > 200


# ---- layers ----------------------------------------------------------------------------------------------------------------------


def test_every_module_has_its_row() -> None:
    unknown = sorted({name_of(path) for path in SOURCES} - ROW.keys())
    assert not unknown, f"new modules {unknown}: give each a row in LAYERS of tests/test_architecture.py, below all that it imports"
    assert sum(map(len, LAYERS)) == len(ROW), "a module has two rows in LAYERS"


def test_a_module_imports_only_from_the_rows_above_it() -> None:
    wrong = [
        f"{where(path, found)}: {name} (row {ROW[name]}) imports {target} (row {ROW[target]}), {found.kind}"
        for path, name, found in IMPORTS
        for target in own(found)
        if name in ROW and target in ROW and target != name and ROW[target] >= ROW[name]
    ]
    assert not wrong, "imports against the layers (LAYERS in tests/test_architecture.py):\n" + "\n".join(wrong)


def test_every_import_of_our_own_exists() -> None:
    there = {name_of(path) for path in SOURCES}
    lost = [f"{where(path, found)}: {target}" for path, _, found in IMPORTS for target in own(found) if target not in there]
    assert not lost, lost


def test_there_is_no_import_cycle() -> None:
    """By the graph and not by the rows, so that it holds whatever LAYERS says."""
    edges: dict[str, set[str]] = {name_of(path): set() for path in SOURCES}
    for _, name, found in IMPORTS:
        if found.kind == "module":
            edges[name] |= {target for target in own(found) if target != name}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, "import cycle: " + " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for target in sorted(edges.get(name, ())):
                visit(target, (*trail, name))
            done.add(name)

    for name in edges:
        visit(name, ())


# ---- who may import what -----------------------------------------------------------------------------------------------------------


def test_only_the_adapter_imports_transformer_lens() -> None:
    users = {name for _, name, found in IMPORTS if found.module.split(".")[0] == "transformer_lens"}
    assert users == {"model"}


@pytest.mark.parametrize("light", [*LIGHT, *sorted({name_of(path) for path in SOURCES if path.name.startswith("cli_")})])
def test_light_modules_import_nothing_heavy_not_even_through_others(light: str) -> None:
    assert light in {name_of(path) for path in SOURCES}, f"emosteer/{light}.py is missing"
    seen, queue = {light: light}, [light]
    while queue:
        name = queue.pop()
        for path, module, found in IMPORTS:
            if module != name or found.kind != "module":
                continue
            top = found.module.split(".")[0]
            assert top not in HEAVY, f"{where(path, found)} imports {top} ({seen[name]}); import it inside the function that needs it"
            for target in own(found):
                if target not in seen:
                    seen[target] = f"{seen[name]} -> {target}"
                    queue.append(target)


def test_nothing_unpickles_or_evaluates() -> None:
    wrong = [f"{where(path, found)}: {found.module}" for path, _, found in IMPORTS if found.module.split(".")[0] in UNSAFE]
    wrong += [
        f"{where(path, found)}: from torch import {name}"
        for path, _, found in IMPORTS
        if found.module.split(".")[0] == "torch"
        for name in found.names
        if name in ("load", "save")
    ]
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            text = ""
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec", "compile", "__import__"):
                text = node.func.id  # model.eval() and re.compile() are methods and fine
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.save", "builtins.eval", "builtins.exec"):
                text = ast.unparse(node)
            if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "trust_remote_code"):
                safe = isinstance(node.value, ast.Constant) and node.value.value is False
                text = "" if safe else f"{node.arg}={ast.unparse(node.value)}"
            if text:
                wrong.append(f"{path.relative_to(PACKAGE.parent)}:{getattr(node, 'lineno', '?')}: {text}")
    assert not wrong, wrong


def test_the_command_line_starts_without_torch() -> None:
    code = "import sys, emosteer.cli; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not HEAVY & set(done.stdout.split()) and "emosteer" in done.stdout.split()
