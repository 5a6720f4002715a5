"""Who may import whom, read from the sources with `ast`: the picture of docs/ARCHITECTURE.md, enforced."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import emosteer

PACKAGE = Path(__file__).parent.parent / "emosteer"

#: Rooms (folders, and the few modules beside them) from the ground up. A room imports from the rows above its own, at any place in a
#: file, typing included; rooms of one row do not know each other.
ROWS: tuple[tuple[str, ...], ...] = (
    ("__init__",),
    ("base",),
    ("scenarios", "models"),
    ("directions", "generation", "judges"),
    ("attribution",),
    ("circuits",),
    ("probing",),
    ("writing", "export"),
    ("calibration", "evaluation", "serving"),
    ("side_effects",),
    ("report",),
    ("api",),
    ("cli",),
    ("__main__",),
)
ROW = {name: index for index, row in enumerate(ROWS) for name in row}

#: The only files that import a library, and the only places that print.
IMPORTERS = {"transformer_lens": ("models/model.py",), "huggingface_hub": ("models/weights/",), "typer": ("cli/",)}
PRINTERS = ("cli/", "base/", "judges/training.py", "judges/choosing/training.py", "serving/vllm_worker.py")

#: Modules that are imported where --help must be instant, or that have no use for tensors; what they import counts as well.
LIGHT = (
    *("__init__", "__main__", "api", "base", "scenarios", "models.weights", "cli"),
    *(
        "directions.settings",
        "attribution.settings",
        "circuits.settings",
        "circuits.methods",
        "circuits.places",
        "circuits.dial",
        "circuits.validation.settings",
    ),
    *(
        "calibration.settings",
        "evaluation.settings",
        "writing.settings",
        "probing.settings",
        "probing.texts",
        "side_effects.settings",
        "side_effects.checks",
        "side_effects.conditions",
        "side_effects.battery",
        "side_effects.limits",
        "generation.decoding",
        "judges.registry",
        "judges.by_hand",
        "api.costs.cost",
        "api.costs.memory",
    ),
    "judges.by_hand_scores",
)
LIGHT_BUT = (
    "api.costs.replies",
    "api.costs.stages",
    "api.costs.studies",
    "api.costs.trials",
    "base.artifacts",
    "base.pieces",
    "base.schema",
    "cli.print_artifacts",
    "cli.print_effects",
    "cli.print_heads",
    "cli.print_probes",
    "cli.print_validation",
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
    """The module's name below the package: `models.model`; a folder's own name for its `__init__`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def room_of(name: str) -> str:
    return name.split(".")[0]


SOURCES = sorted(path for path in PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8"), str(path)) for path in SOURCES}
NAMES = {name_of(path): path for path in SOURCES}
IMPORTS = [(path, name_of(path), found) for path in SOURCES for found in imports_of(TREES[path])]
#: The public names that the package's own file announces to type checkers. It imports them when they are used, by name (`_HOMES`), and
#: everybody may import its version: it is both the ground and the front door.
ANNOUNCED = [found for _, name, found in IMPORTS if name == "__init__" and found.kind == "typing"]
GRAPH = [(path, name, found) for path, name, found in IMPORTS if found not in ANNOUNCED]


def own(found: Import) -> list[str]:
    """The modules of this package that an import names (one that is not there too, so that it can be reported)."""
    top, _, rest = found.module.partition(".")
    if top != "emosteer":
        return []
    if not found.names:
        return [rest or "__init__"]
    modules = [f"{rest}.{name}".strip(".") for name in found.names]
    return sorted({module if module in NAMES else rest or "__init__" for module in modules})


def where(path: Path, found: Import) -> str:
    return f"{path.relative_to(PACKAGE.parent)}:{found.line}"


def inside(path: Path, places: tuple[str, ...]) -> bool:
    """Whether a file is one of some places: "folder/" or "folder/file.py"."""
    return path.relative_to(PACKAGE).as_posix().startswith(places)


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
    assert own(Import("emosteer.base", ("artifacts", "files"), "module", 1)) == ["base.artifacts", "base.files"]
    assert own(Import("emosteer", ("__version__", "base"), "module", 1)) == ["__init__", "base"]
    assert own(Import("emosteer.models.sites", ("Z",), "module", 1)) == ["models.sites"] and own(Import("torch.nn", (), "module", 1)) == []
    assert len(SOURCES) > 20 and len(IMPORTS) > 200


# ---- rooms -----------------------------------------------------------------------------------------------------------------------


def test_every_room_has_its_row() -> None:
    rooms = {room_of(name) for name in NAMES}
    assert rooms == ROW.keys(), f"give each room a row in ROWS and a line in docs/ARCHITECTURE.md: {sorted(rooms ^ ROW.keys())}"
    assert sum(map(len, ROWS)) == len(ROW) <= 20, "a room has two rows, or there are more than 20 at the top level"


def test_a_room_imports_only_from_the_rows_above_it() -> None:
    wrong = [
        f"{where(path, found)}: {room_of(name)} imports {target} ({found.kind})"
        for path, name, found in GRAPH
        for target in own(found)
        if room_of(target) != room_of(name) and ROW[room_of(target)] >= ROW[room_of(name)]
    ]
    assert not wrong, "imports against the rows (ROWS in tests/test_architecture.py):\n" + "\n".join(wrong)


def test_every_import_of_our_own_exists() -> None:
    lost = [f"{where(path, found)}: {target}" for path, _, found in IMPORTS for target in own(found) if target not in NAMES]
    assert not lost, lost


def cycle_in(edges: dict[str, set[str]]) -> str:
    """A cycle as "a -> b -> a", or "" where there is none."""
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> str:
        if name in trail:
            return " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for target in sorted(edges.get(name, ())):
                if found := visit(target, (*trail, name)):
                    return found
            done.add(name)
        return ""

    return next(filter(None, (visit(name, ()) for name in edges)), "")


def test_there_is_no_import_cycle_between_modules_or_rooms() -> None:
    """By the graph and not by the rows, so that it holds whatever ROWS says; imports inside functions and for typing count too."""
    modules: dict[str, set[str]] = {name: set() for name in NAMES}
    rooms: dict[str, set[str]] = {room_of(name): set() for name in NAMES}
    for _, name, found in GRAPH:
        for target in own(found):
            if target != name:
                modules[name].add(target)
            if room_of(target) != room_of(name):
                rooms[room_of(name)].add(room_of(target))
    assert cycle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == "b -> c -> b"
    assert not cycle_in(modules)
    assert not cycle_in(rooms)


def test_the_front_door_announces_what_it_hands_on() -> None:
    announced = {name: found.module for found in ANNOUNCED for name in found.names}
    assert announced == emosteer._HOMES and {*announced, "__version__"} == {*emosteer.__all__}
    assert not [found for _, name, found in GRAPH if name == "__init__" and own(found)]


def test_a_folder_s_own_file_says_what_it_is_and_imports_nothing() -> None:
    """But the package's, which is the public API, and the report's, which hands on its one function."""
    for path in SOURCES:
        if path.name == "__init__.py" and name_of(path) not in ("__init__", "report"):
            body = TREES[path].body
            assert len(body) == 1 and isinstance(body[0], ast.Expr) and ast.get_docstring(TREES[path]), name_of(path)
    assert {found.module for _, name, found in IMPORTS if name == "report"} <= {"__future__", "emosteer.report.page"}


def test_modules_and_functions_stay_readable() -> None:
    """No module above 400 lines, no function above 60; the option lists of commands apart."""
    long = [f"{name}: {lines} lines" for name, path in NAMES.items() if (lines := path.read_text(encoding="utf-8").count("\n")) > 400]
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and (node.end_lineno or 0) - node.body[0].lineno >= 60:
                long.append(f"{path.relative_to(PACKAGE)}:{node.lineno} {node.name}")
    assert not long, long


# ---- who may import what -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", IMPORTERS)
def test_a_library_has_one_door(library: str) -> None:
    users = [where(path, found) for path, _, found in IMPORTS if found.module.split(".")[0] == library]
    wrong = [user for user in users if not user.removeprefix("emosteer/").startswith(IMPORTERS[library])]
    assert users and not wrong, f"only {', '.join(IMPORTERS[library])} may import {library}: {wrong}"


def test_only_the_command_line_prints() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path, tree in TREES.items()
        if not inside(path, PRINTERS)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "sys.stdout.write", "sys.stderr.write")
    ]
    assert not wrong, wrong


def is_light(name: str) -> bool:
    return name not in LIGHT_BUT and any(name == light or name.startswith(f"{light}.") for light in LIGHT)


@pytest.mark.parametrize("light", sorted(name for name in NAMES if is_light(name)))
def test_light_modules_import_nothing_heavy_not_even_through_others(light: str) -> None:
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


@pytest.mark.parametrize("module", ["emosteer", "emosteer.cli.main"])
def test_importing_it_loads_no_torch(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not HEAVY & set(done.stdout.split()) and "emosteer" in done.stdout.split()
