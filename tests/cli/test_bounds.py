"""Numbers of the command line: bounded above where they count something, finite, read alike everywhere, and seeds of any size."""

from __future__ import annotations

import ast
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.main import get_command

import emosteer
from emosteer.base.errors import UsageError
from emosteer.base.seeds import torch_seed
from emosteer.calibration.settings import CalibrateSettings
from emosteer.circuits.settings import GainSettings
from emosteer.cli import main as cli
from emosteer.cli.checked import MAX_DIGITS
from emosteer.evaluation.bootstrap import Draws
from emosteer.evaluation.settings import EvaluationSettings
from emosteer.generation.decoding import Decoding

ROOT: Any = get_command(cli.app)


def numbers(kind: type) -> Iterator[tuple[str, Any]]:
    """(command, option) of every option that takes a number of this kind."""
    commands = dict(ROOT.commands) | {f"models {name}": command for name, command in ROOT.commands["models"].commands.items()}
    for name, command in commands.items():
        hints = typing.get_type_hints(command.callback) if command.callback else {}
        for option in command.params:
            if hints.get(option.name) in (kind, kind | None):
                yield name, option


#: What refuses a number: ours, or typer's in the words of its versions.
REFUSED = "finite number|not in the range|should be (less|greater) than|valid (integer|float|number)|at most 300 digits"
#: What a command asks for before anything else.
NEEDED = {"geometry": ["x"], "judge": ["texts.jsonl"], "export": ["--emotion", "anger", "--out", "x"]}
INTEGERS, FLOATS = list(numbers(int)), list(numbers(float))


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The line with which a command line is refused as wrong."""
    with pytest.raises(SystemExit) as ended:
        cli.guarded(lambda: ROOT.main(list(arguments), prog_name="emosteer", standalone_mode=False))  # as `main`, which builds it anew
    line = capsys.readouterr().err
    assert ended.value.code == 2 and line.count("\n") == 1, line
    return line


def test_the_options_are_found() -> None:
    assert len(INTEGERS) > 30 and len(FLOATS) > 20


@pytest.mark.parametrize(("command", "option"), INTEGERS, ids=lambda value: getattr(value, "name", value))
def test_every_count_has_a_highest_value_that_is_kept_to(capsys: pytest.CaptureFixture[str], command: str, option: Any) -> None:
    if option.name == "seed":
        assert "at most 300 digits" in said(capsys, *command.split(), *NEEDED.get(command, ()), "--seed", "1" * (MAX_DIGITS + 1))
        return
    name = max(option.opts, key=len)
    assert option.max is not None, f"{command} {name} has no highest value"
    for value in (option.max + 1, 10**30, "9" * 400):
        line = said(capsys, *command.split(), *NEEDED.get(command, ()), name, str(value))
        assert re.search(REFUSED, line), line


@pytest.mark.parametrize(("command", "option"), FLOATS, ids=lambda value: getattr(value, "name", value))
def test_numbers_that_are_none_are_refused_everywhere(capsys: pytest.CaptureFixture[str], command: str, option: Any) -> None:
    name = max(option.opts, key=len)
    for value in ("nan", "inf", "-inf", "1e999", "1.5x"):
        line = said(capsys, *command.split(), *NEEDED.get(command, ()), f"{name}={value}")
        assert re.search(REFUSED, line), line


@pytest.mark.parametrize("value", [" 5", "5 ", "\t5\n"])
def test_spaces_around_a_number_do_not_count(capsys: pytest.CaptureFixture[str], value: str) -> None:
    """Neither where the command line reads it nor where a list of numbers does."""
    assert "--author needs --domain" in said(capsys, "build", "--author", "--count", value)
    assert "found '5x'" in said(capsys, "circuit", "--strength", "5x")
    assert "unknown kind 'none-such'" in said(capsys, "ablate", "--shares", value.replace("5", "0.5"), "--kinds", "none-such")


@pytest.mark.parametrize(
    "make",
    [
        lambda: GainSettings(steps=10**30),
        lambda: CalibrateSettings(points=10**30),
        lambda: CalibrateSettings(refine=10**30),
        lambda: Decoding(max_new_tokens=10**30),
        lambda: EvaluationSettings(doses=(1e30,)),
        lambda: EvaluationSettings(doses=(1.0,) * 1000),
    ],
)
def test_functions_refuse_what_would_run_for_ever_too(make: Any) -> None:
    with pytest.raises(UsageError, match="found (1000|1)"):
        make()


@pytest.mark.parametrize("seed", [0, -1, 7, 2**63 - 1])
def test_seeds_that_torch_takes_stay_as_they_are(seed: int) -> None:
    assert torch_seed(seed) == seed


@pytest.mark.parametrize("seed", [2**63, 10**30, -(10**30)])
def test_larger_ones_are_hashed_and_still_tell_draws_apart(seed: int) -> None:
    one, again, other = (Draws.make(5, 20, each).counts for each in (seed, seed, seed + 1))
    assert torch.equal(one, again) and not torch.equal(one, other)


@pytest.mark.parametrize(
    "arguments", [["probe", "--out", "\udcff"], ["generate", "x\udcff", "-e", "anger"], ["extract", "--scenarios", "a\udc80"]]
)
def test_bytes_that_are_no_text_are_refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert "to be UTF-8 text, found other bytes" in said(capsys, *arguments)


def test_text_of_any_script_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no-such-option" in said(capsys, "generate", "怒り 🙂", "--no-such-option")


def test_no_generator_is_seeded_with_what_a_user_gave_as_it_is() -> None:
    """Any whole number is a seed; torch takes 64 bits."""
    planted = "g.manual_seed(seed); g.manual_seed(a.seed + 1); g.manual_seed(torch_seed(seed)); g.manual_seed(0)"
    assert len(bare_seeds(ast.parse(planted))) == 2
    files = sorted(Path(emosteer.__file__).parent.rglob("*.py"))
    assert {file.name: found for file in files if (found := bare_seeds(ast.parse(file.read_text("utf-8"))))} == {}


def bare_seeds(tree: ast.Module) -> list[str]:
    """What generators are seeded with that names a seed outside a call."""
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute))
    given = [call.args[0] for call in calls if call.func.attr == "manual_seed"]  # type: ignore[attr-defined]
    return [ast.unparse(seed) for seed in given if not isinstance(seed, ast.Call) and "seed" in ast.unparse(seed)]
