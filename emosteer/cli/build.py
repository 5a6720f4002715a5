"""``emosteer build``: check, count and split a SEV dataset, or have a language model write one. Imports are inside: --help is instant."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from emosteer.base.errors import UsageError
from emosteer.judges.registry import KEY_ENV

if TYPE_CHECKING:
    from emosteer.scenarios.authoring import AuthorReport, ScenarioAuthor
    from emosteer.scenarios.lints import Problem
    from emosteer.scenarios.scenarios import Bank, Scenario

SHOWN_PROBLEMS = 20


def build(
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE.jsonl", help="The SEV file to check, count and split.", show_default=False)
    ] = None,
    replies: Annotated[Path | None, typer.Option(metavar="BANK.jsonl", help="Check this reply bank too.", show_default=False)] = None,
    against: Annotated[
        Path | None, typer.Option(metavar="OTHER.jsonl", help="Must share no scenario with FILE.", show_default=False)
    ] = None,
    emotions: Annotated[str, typer.Option(help="Emotions that each group of the bank needs: all, or a,b,c.")] = "all",
    split: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Share of the test side; needs --out DIR.", show_default=False)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Directory for --split, file for --author.", show_default=False)] = None,
    author: Annotated[bool, typer.Option("--author", help="Have a language model write scenarios; goes on where --out ends.")] = False,
    domain: Annotated[str | None, typer.Option(help='What to write about: "night-shift nursing".', show_default=False)] = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Scenarios that --out is to hold in the end.")] = 40,
    themes: Annotated[str | None, typer.Option(help="Themes a,b,c that share the scenarios equally.", show_default=False)] = None,
    base_url: Annotated[
        str | None, typer.Option(help="An OpenAI-compatible endpoint, e.g. http://127.0.0.1:8000/v1.", show_default=False)
    ] = None,
    model: Annotated[str | None, typer.Option(help="Its model's name; without --base-url a local model.", show_default=False)] = None,
    api_key_env: Annotated[str, typer.Option(help="The environment variable that holds the key.")] = KEY_ENV,
    attempts: Annotated[int, typer.Option(min=1, help="Answers per scenario before it is given up.")] = 4,
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0, help="Of the author's sampling.")] = 0.9,
    seed: Annotated[int, typer.Option(help="Fixes the split, and the author's order of themes.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, with every problem.")] = False,
) -> None:
    """Check, count and split a dataset, or write a new one for your domain.

    Exits with 1 if a check found problems.
    """
    if author:
        if file or replies or against or split is not None:
            raise UsageError("--author writes new scenarios to --out; check or split the file afterwards: emosteer build FILE.jsonl")
        if not domain:
            raise UsageError("--author needs --domain: what to write about, e.g. 'night-shift nursing'")
        if out is None:
            raise UsageError("--author needs --out FILE.jsonl: where the scenarios go")
        names = themes.split(",") if themes is not None else None
        _author(domain, count, out, names, base_url, model, api_key_env, seed, attempts, temperature, as_json)
        return
    if file is None:
        raise UsageError("expected a FILE.jsonl to check, or --author to write one; see emosteer build --help")
    given = {"--domain": domain, "--themes": themes, "--base-url": base_url, "--model": model}
    if stray := [name for name, value in given.items() if value is not None]:
        raise UsageError(f"{stray[0]} has a meaning with --author only; add --author, or leave it out")
    if (split is None) != (out is None):
        raise UsageError("--split SHARE and --out DIR go together: the share of the test side, and where train.jsonl and test.jsonl go")
    _check(file, replies, against, emotions, None if split is None or out is None else (split, out), seed, as_json)


# ---- check, count, split -------------------------------------------------------------------------------------------


def _check(
    file: Path, replies: Path | None, against: Path | None, emotions: str, split: tuple[float, Path] | None, seed: int, as_json: bool
) -> None:
    from emosteer.scenarios.lints import lint_bank, lint_scenarios, overlap_between
    from emosteer.scenarios.scenarios import EMOTIONS, parse_emotions, read_bank, read_scenarios

    scenarios = read_scenarios(file)
    bank = read_bank(replies) if replies else {}
    known = dict.fromkeys([*EMOTIONS, *(emotion for answers in bank.values() for emotion in answers)])
    wanted = EMOTIONS if emotions.strip().lower() == "all" else parse_emotions(emotions, tuple(known))
    problems = lint_scenarios(scenarios)
    if replies:
        problems += lint_bank(bank, wanted) + _unmatched(scenarios, bank)
    if against:
        problems += overlap_between(read_scenarios(against), scenarios)
    sides = _split(file, scenarios, *split, seed) if split else {}
    summary = _summary(file, scenarios, bank, sides)
    if as_json:
        summary["problems"] = [{"where": p.where, "rule": p.rule, "message": p.message} for p in problems]
        typer.echo(json.dumps(summary, ensure_ascii=False))
    else:
        _print_summary(summary)
        _print_problems(problems)
    if problems:
        raise typer.Exit(1)


def _unmatched(scenarios: Sequence[Scenario], bank: Bank) -> list[Problem]:
    """Replies to groups that the scenario file does not hold, and groups that nothing replies to."""
    from emosteer.scenarios.lints import Problem
    from emosteer.scenarios.scenarios import groups_of

    keys = {group.key for group in groups_of(scenarios)}
    found = [
        Problem(str(key), "not matched", "the bank replies to it, the scenario file does not hold it") for key in sorted(bank.keys() - keys)
    ]
    return found + [Problem(str(key), "not matched", "the bank holds no reply to it") for key in sorted(keys - bank.keys())]


def _split(file: Path, scenarios: Sequence[Scenario], share: float, folder: Path, seed: int) -> dict[Path, list[Scenario]]:
    """Writes both sides; neither file changes unless both could be written.

    Raises:
        UsageError: if one of them is the file that was read.
    """
    from emosteer.base.files import atomic_path
    from emosteer.scenarios.splits import split

    train, test = split(scenarios, share, seed)
    sides = {folder / "train.jsonl": train, folder / "test.jsonl": test}
    if any(path.exists() and path.samefile(file) for path in sides):
        raise UsageError(f"--out {folder} would overwrite {file}; choose another directory")
    first, second = sides
    with atomic_path(first) as one, atomic_path(second) as two:
        for temporary, side in ((one, train), (two, test)):
            temporary.write_text("".join(json.dumps(s.to_row(), ensure_ascii=False) + "\n" for s in side), encoding="utf-8")
    return sides


def _spread(texts: Sequence[str]) -> dict[str, float]:
    counts = [len(text.split()) for text in texts]
    return {"min": min(counts), "mean": round(sum(counts) / len(counts), 1), "max": max(counts)}


def _summary(file: Path, scenarios: Sequence[Scenario], bank: Bank, sides: dict[Path, list[Scenario]]) -> dict[str, Any]:
    from emosteer.scenarios.scenarios import VALENCES

    words = {"scenario": _spread([s.text for s in scenarios])}
    words |= {f"event.{valence}": _spread([s.events[valence] for s in scenarios]) for valence in VALENCES}
    summary: dict[str, Any] = {
        "file": str(file),
        "scenarios": len(scenarios),
        "groups": len(scenarios) * len(VALENCES),
        "themes": dict(Counter(s.theme for s in scenarios)),
        "words": words,
    }
    if bank:
        texts: dict[str, list[str]] = {}
        for answers in bank.values():
            for emotion, text in answers.items():
                texts.setdefault(emotion, []).append(text)
        summary["replies"] = {emotion: {"count": len(said), "words": _spread(said)} for emotion, said in texts.items()}
    if sides:
        summary["written"] = {
            str(path): {"scenarios": len(side), "themes": dict(Counter(s.theme for s in side))} for path, side in sides.items()
        }
    return summary


def _print_summary(summary: dict[str, Any]) -> None:
    written = summary.get("written", {})
    typer.echo(f"{summary['file']}: {summary['scenarios']} scenarios, {summary['groups']} groups")
    rows = [[theme or "(none)", n, *(side["themes"].get(theme, 0) for side in written.values())] for theme, n in summary["themes"].items()]
    _table(["theme", "scenarios", *(Path(path).stem for path in written)], rows)
    _table(["words", "min", "mean", "max"], [[part, *spread.values()] for part, spread in summary["words"].items()])
    if "replies" in summary:
        rows = [[emotion, found["count"], *found["words"].values()] for emotion, found in summary["replies"].items()]
        _table(["emotion", "replies", "min words", "mean", "max"], rows)
    for path, side in written.items():
        typer.echo(f"wrote {path}: {side['scenarios']} scenarios")


def _table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))  # Text: a theme like "[b]" is no markup
    console = Console()
    console.print(table)
    console.print()


def _print_problems(problems: Sequence[Problem]) -> None:
    for problem in problems[:SHOWN_PROBLEMS]:
        typer.echo(str(problem))
    if len(problems) > SHOWN_PROBLEMS:
        typer.echo(f"... and {len(problems) - SHOWN_PROBLEMS} more: --json prints them all")
    typer.echo(f"{len(problems)} problem{'s' * (len(problems) != 1)} found" if problems else "no problems found")


# ---- author --------------------------------------------------------------------------------------------------------


def _author(
    domain: str,
    count: int,
    out: Path,
    themes: list[str] | None,
    base_url: str | None,
    model: str | None,
    api_key_env: str,
    seed: int,
    attempts: int,
    temperature: float,
    as_json: bool,
) -> None:
    from emosteer.base import progress
    from emosteer.scenarios.author_prompts import THEMES
    from emosteer.scenarios.authoring import AuthorEvent, author_scenarios

    writer = _writer(base_url, model, api_key_env, temperature)
    held = 0
    with contextlib.suppress(OSError):  # no file yet; whatever else is wrong with it is told by the run
        held = min(out.read_bytes().count(b"\n"), count)
    with progress.bar("scenarios", count, held) as advance:

        def show(event: AuthorEvent) -> None:
            nonlocal held
            advance(event.held - held)
            held = event.held
            if event.kind != "accepted":
                progress.note(f"{event.kind}: {event.message}")

        report = author_scenarios(writer, domain, count, out, THEMES if themes is None else themes, None, seed, attempts, show)
    _print_report(report, out, as_json)
    if report.interrupted:
        raise typer.Exit(130)


def _writer(base_url: str | None, model: str | None, api_key_env: str, temperature: float) -> ScenarioAuthor:
    """The author at an endpoint, or a local model.

    Raises:
        UsageError: if it is not said who writes, or the named key is not there.
    """
    import os

    from emosteer.base import progress
    from emosteer.scenarios.authoring import LocalAuthor, OpenAIAuthor

    if not model:
        raise UsageError("who is to write? --model NAME for a local model, or --base-url URL --model NAME for a server")
    if base_url is None:
        if "://" in model:
            raise UsageError("--model is a URL; give the address as --base-url, and the model's name there as --model")
        from emosteer.generation.generate import completer

        return LocalAuthor(completer(model, temperature=temperature, max_new_tokens=512))
    if api_key_env != KEY_ENV and not os.environ.get(api_key_env):
        raise UsageError(f"the environment variable {api_key_env} that --api-key-env names is not set")
    return OpenAIAuthor(base_url, model, key_env=api_key_env, temperature=temperature, notify=progress.note)


def _print_report(report: AuthorReport, out: Path, as_json: bool) -> None:
    if as_json:
        counts = {"accepted": report.accepted, "rejected": report.rejected, "attempts": report.attempts, "reasons": dict(report.reasons)}
        typer.echo(
            json.dumps({"file": str(out), "scenarios": report.held, **counts, "interrupted": report.interrupted}, ensure_ascii=False)
        )
        return
    why = ", ".join(f"{rule} {n}" for rule, n in report.reasons.most_common())
    typer.echo(f"{'interrupted: ' if report.interrupted else ''}{out} holds {report.held} scenario{'s' * (report.held != 1)}")
    typer.echo(
        f"accepted {report.accepted}, rejected {report.rejected}, in {report.attempts} answers" + (f"; refused for: {why}" if why else "")
    )
