"""The table of methods: whole, in the orders that results depend on, and the only place that decides by a method's name."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from pathlib import Path

import pytest

from emosteer.base.errors import UsageError
from emosteer.circuits.circuit import default_strengths
from emosteer.circuits.methods import (
    CONTEST,
    CONTROLS,
    GENERATE,
    METHODS,
    PROMPTS,
    STEERED,
    VLLM,
    Kind,
    Part,
    source_of,
)
from emosteer.evaluation.controls import BUILDERS, vectors_of
from emosteer.evaluation.evaluate import EvaluationSettings, rivals_of
from emosteer.report import contest_figures, wording
from emosteer.report.plots import Style
from emosteer.scenarios.prompts import ELICITATIONS, plain
from emosteer.writing.jobs import Job, jobs_for, request_of
from tests.helpers.contest_setup import EMOTIONS, groups, parts

PACKAGE = Path(__file__).parents[2] / "emosteer"
#: A name as methods have it, in a string of the source.
NAMES = re.compile(r"\b(?:prompt|random|learned)-[a-z]+\b")


# ---- the table -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_row_is_whole(name: str) -> None:
    row, colours = METHODS[name], (PACKAGE / "report" / "style.css").read_text(encoding="utf-8")
    assert row.name == name and row.label and row.phrase
    assert f"--{row.look.paint}:" in colours, "the report's style sheet has its colour"
    assert row.steers == (row.kind in (Kind.STEERED, Kind.CONTROL)) == (row.strength is not None)
    assert row.asks == (row.elicitation is not None) and row.elicitation in (None, *ELICITATIONS)
    assert (row.controls is not None) == (row.kind is Kind.CONTROL) and METHODS[source_of(name)].strength is row.strength
    assert row.built == (name in BUILDERS) and (row.steers or not row.built)
    assert row.generate or row.turn is not None, "somebody offers it"
    assert not (row.vllm and not row.generate) and not (row.generate and row.built), "generate adds a circuit's own vectors"
    assert not row.dial or row.steers


def test_methods_are_told_apart() -> None:
    for field in ("label", "phrase"):
        assert len({getattr(row, field) for row in METHODS.values()}) == len(METHODS), field
    assert len({(row.look.paint, row.look.dash) for row in METHODS.values()}) == len(METHODS), "colour and dash"
    shapes = {(row.look.paint, row.look.shape) for row in METHODS.values() if row.turn is not None}
    assert len(shapes) == len(CONTEST), "colour and shape, of points that stand in one plot"


def test_the_orders_are_what_results_and_pages_keep() -> None:
    controls = ("random-heads", "random-circuit", "random-direction")
    prompts = ("prompt-tone", "prompt-system", "prompt-stimulus", "prompt-examples")
    written = ("prompt-system", "prompt-tone", "prompt-stimulus", "prompt-examples")
    assert ("none", *written, "residual", "learned-residual", "circuit", *controls) == CONTEST
    assert wording.ordered(CONTEST) == ["circuit", "residual", "learned-residual", *prompts, "none", *controls]
    assert GENERATE == ("circuit", "residual", "learned-residual", "prompt", "none") and VLLM == ("circuit", "prompt", "none")
    assert written == PROMPTS
    assert controls == CONTROLS and STEERED == ("circuit", "residual", "learned-residual")
    assert [source_of(name) for name in CONTROLS] == ["circuit", "circuit", "residual"]
    assert EvaluationSettings().methods == CONTEST


def test_the_page_names_and_draws_every_method() -> None:
    steered, prompts = (
        ["Circuit", "Residual steering", "Learned residual"],
        ["Prompt", "Prompt: tone", "Prompt: system", "Prompt: stimulus", "Prompt: examples"],
    )
    assert [wording.label(name) for name in METHODS] == [
        *steered,
        *prompts,
        "Unsteered",
        "Random heads",
        "Random circuit",
        "Random direction",
    ]
    prompts = ["the prompt", "the tone prompt", "the system prompt", "the stimulus prompt", "the examples prompt"]
    phrases = ["the circuit", "residual steering", "learned residual steering", *prompts, "no steering"]
    assert [wording.in_sentence(name) for name in METHODS] == [*phrases, "random heads", "random circuit", "random direction"]
    assert contest_figures.style("residual") == Style("m-residual", "square", (7, 3))
    assert contest_figures.style("learned-residual") == Style("m-learned", "triangle-right", (6, 2, 2, 2))
    assert contest_figures.style("prompt-system") == Style("m-system", "triangle-down", (5, 2, 1, 2))
    assert contest_figures.style("none") == Style("m-none", "cross") and contest_figures.style("random-circuit").dash == (2, 4)


def test_a_method_of_another_version_is_shown_by_its_name() -> None:
    assert wording.label("Later") == "Later" and wording.in_sentence("Later") == "later" and wording.asked_by("Later") == "Later"
    assert wording.ordered(["later", "none"]) == ["none", "later"]
    look = contest_figures.style("later")
    assert look.shape not in {row.look.shape for row in METHODS.values()}


# ---- who is compared -----------------------------------------------------------------------------------------------------------


def test_rivals_follow_from_the_table() -> None:
    assert rivals_of(CONTEST, "prompt-tone") == [
        ("circuit", "residual"),
        ("circuit", "learned-residual"),
        ("residual", "learned-residual"),
        ("circuit", "prompt-tone"),
        ("residual", "prompt-tone"),
        ("learned-residual", "prompt-tone"),
        ("circuit", "none"),
        ("residual", "none"),
        ("learned-residual", "none"),
        ("circuit", "random-heads"),
        ("circuit", "random-circuit"),
        ("residual", "random-direction"),
    ]
    assert rivals_of(("none", "circuit"), None) == [("circuit", "none")]


@pytest.mark.parametrize("control", CONTROLS)
def test_a_control_comes_with_what_it_controls(control: str) -> None:
    source = source_of(control)
    with pytest.raises(UsageError, match=f"{control} takes the strengths of {source}; add {source} to --methods"):
        EvaluationSettings(tuple(name for name in CONTEST if name != source and name in ("none", control)))


# ---- what a row decides ----------------------------------------------------------------------------------------------------------


def test_default_strengths_come_from_the_part_that_a_row_names() -> None:
    _, circuit, _ = parts()
    varied = circuit.with_strength([1.0, 2.0, 3.0], 0.5)
    units, stream = dict(zip(EMOTIONS, (1.0, 2.0, 3.0), strict=True)), dict.fromkeys(EMOTIONS, 0.5)
    assert default_strengths(varied, CONTEST) == {
        "residual": stream,
        "learned-residual": dict.fromkeys(EMOTIONS, 1.0),
        "circuit": units,
        "random-heads": units,
        "random-circuit": units,
        "random-direction": stream,
    }
    (group,) = groups(1)
    for name in GENERATE:
        found = [job.strength for job in jobs_for("x", group, EMOTIONS, name, None, varied, {})]
        wanted = {Part.UNITS: [1.0, 2.0, 3.0], Part.STREAM: [0.5] * 3, Part.LEARNED_STREAM: [1.0] * 3, None: [None] * 3}
        assert found == wanted[METHODS[name].strength]


def test_only_what_steers_adds_vectors_and_only_what_asks_has_its_own_prompt() -> None:
    model, circuit, directions = parts()
    (group,) = groups(1)
    bare = tuple(model.prompt_ids(plain(group.text, "")))
    for name, row in METHODS.items():
        assert bool(vectors_of(model, circuit, directions, name, 0)) == row.steers
        assert (request_of(model, Job.of(group, "anger", name, None), "").ids != bare) == row.asks, name


def test_learned_gains_are_read_from_the_metrics() -> None:
    _, circuit, _ = parts()
    assert not circuit.learned_gains and replace(circuit, metrics={**circuit.metrics, "gains": {}}).learned_gains


# ---- the rest of the package ---------------------------------------------------------------------------------------------------


def sources() -> list[tuple[str, ast.Module]]:
    paths = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "circuits" / "methods.py")
    return [(path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text(encoding="utf-8"))) for path in paths]


def test_every_method_that_the_package_names_is_in_the_table() -> None:
    named = {
        (where, name)
        for where, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for name in NAMES.findall(node.value)
        if name != "prompt-toolkit"  # a package
    }
    assert ("evaluation/controls.py", "random-heads") in named
    assert not {(where, name) for where, name in named if name not in METHODS}


def decisions_by_name(tree: ast.Module) -> list[str]:
    """Comparisons of something called a method with a string, or with strings: what the table's fields are for."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [ast.unparse(side) for side in (node.left, *node.comparators)]
            strings = [value for value in ast.walk(node) if isinstance(value, ast.Constant) and value.value in METHODS]
            found += [ast.unparse(node)] * bool(strings and any(side.split(".")[-1] == "method" for side in sides))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("startswith", "removeprefix"):
            prefixes = [value.value for value in node.args if isinstance(value, ast.Constant)]
            found += [ast.unparse(node)] * any(prefix in ("prompt-", "random-") for prefix in prefixes)
    return found


def test_nothing_decides_by_a_method_s_name() -> None:
    planted = "a.method == 'circuit' or method in ('none', 'x') or kind == 'circuit'; b.removeprefix('prompt-')"
    assert len(decisions_by_name(ast.parse(planted))) == 3
    assert {where: found for where, tree in sources() if (found := decisions_by_name(tree))} == {}
