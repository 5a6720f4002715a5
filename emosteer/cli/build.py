"""``emosteer build``: check, count and split a dataset, or have a language model write one. Imports are inside: --help is instant."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from emosteer.base.errors import UsageError
from emosteer.cli.announce import DryRunOption, announced
from emosteer.cli.command_line import typed
from emosteer.judges.registry import KEY_ENV

if TYPE_CHECKING:
    from emosteer.scenarios.authoring import AuthorReport, ScenarioAuthor
    from emosteer.scenarios.contamination import Contamination
    from emosteer.scenarios.lints import Problem
    from emosteer.scenarios.scenarios import Bank, Group, Scenario

SHOWN_PROBLEMS = 20
#: Of a scenario with its events.
ANSWER_TOKENS = 512


def build(
    context: typer.Context,
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE.jsonl", help="The SEV or prompt file to check, count and split.", show_default=False)
    ] = None,
    replies: Annotated[Path | None, typer.Option(metavar="BANK.jsonl", help="Check this reply bank too.", show_default=False)] = None,
    against: Annotated[
        Path | None, typer.Option(metavar="OTHER.jsonl", help="Must share no scenario or prompt with FILE.", show_default=False)
    ] = None,
    emotions: Annotated[str, typer.Option(help="Emotions that each group of the bank needs: all, or a,b,c.")] = "all",
    most_contaminated: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            metavar="SHARE",
            help="With --replies: a problem if subject words alone name the emotion of more replies.",
            show_default=False,
        ),
    ] = None,
    split: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Share of the test side; needs --out DIR.", show_default=False)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Directory for --split, file for --author.", show_default=False)] = None,
    author: Annotated[bool, typer.Option("--author", help="Have a language model write scenarios; goes on where --out ends.")] = False,
    domain: Annotated[str | None, typer.Option(help='What to write about: "night-shift nursing".', show_default=False)] = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, max=100_000, help="Scenarios that --out is to hold in the end.")] = 40,
    themes: Annotated[str | None, typer.Option(help="Themes a,b,c that share the scenarios equally.", show_default=False)] = None,
    base_url: Annotated[
        str | None, typer.Option(help="An OpenAI-compatible endpoint, e.g. http://127.0.0.1:8000/v1.", show_default=False)
    ] = None,
    model: Annotated[str | None, typer.Option(help="Its model's name; without --base-url a local model.", show_default=False)] = None,
    api_key_env: Annotated[str, typer.Option(help="The environment variable that holds the key.")] = KEY_ENV,
    attempts: Annotated[int, typer.Option(min=1, max=100, help="Answers per scenario before it is given up.")] = 4,
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0, help="Of the author's sampling.")] = 0.9,
    seed: Annotated[int, typer.Option(help="Fixes the split, and the author's order of themes.")] = 0,
    dry_run: DryRunOption = False,
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
        if not model:
            raise UsageError("who is to write? --model NAME for a local model, or --base-url URL --model NAME for a server")
        if stray := typed(context, ("emotions", "most_contaminated")):
            raise UsageError(f"{stray[0]} is of a bank that is checked; leave it out, or leave out --author")
        names = themes.split(",") if themes is not None else None
        _author(domain, count, out, names, base_url, model, api_key_env, seed, attempts, temperature, dry_run, as_json)
        return
    if file is None:
        raise UsageError("expected a FILE.jsonl to check, or --author to write one; see emosteer build --help")
    if dry_run:
        raise UsageError("--dry-run has a meaning with --author only; a check takes no time")
    if stray := typed(context, ("domain", "count", "themes", "base_url", "model", "api_key_env", "attempts", "temperature")):
        raise UsageError(f"{stray[0]} has a meaning with --author only; add --author, or leave it out")
    if most_contaminated is not None and replies is None:
        raise UsageError("--most-contaminated is about replies; give the bank with --replies")
    if (split is None) != (out is None):
        raise UsageError("--split SHARE and --out DIR go together: the share of the test side, and where train.jsonl and test.jsonl go")
    _check(file, replies, against, emotions, most_contaminated, None if split is None or out is None else (split, out), seed, as_json)


# ---- check, count, split -------------------------------------------------------------------------------------------


def _check(
    file: Path,
    replies: Path | None,
    against: Path | None,
    emotions: str,
    most: float | None,
    split: tuple[float, Path] | None,
    seed: int,
    as_json: bool,
) -> None:
    from emosteer.scenarios.contamination import contamination_of_bank
    from emosteer.scenarios.emotions import EMOTIONS, emotion_key, parse_emotions
    from emosteer.scenarios.lints import (
        lint_bank,
        lint_contamination,
        lint_prompts,
        lint_scenarios,
        once,
        overlap_of_situations,
        overlap_of_texts,
    )
    from emosteer.scenarios.prompt_sets import read_events, read_groups
    from emosteer.scenarios.scenarios import read_bank

    scenarios, groups = read_events(file), read_groups(file)
    prompts = [group for group in groups if not group.key.valence]
    if split and prompts:
        raise UsageError(f"--split is of scenarios, and {file} holds {len(prompts)} prompts; leave it out, or give a SEV file")
    bank = read_bank(replies) if replies else {}
    known = dict.fromkeys([*EMOTIONS, *(emotion for answers in bank.values() for emotion in answers)])
    wanted = EMOTIONS if emotion_key(emotions) == "all" else parse_emotions(emotions, tuple(known))
    problems, measured = lint_scenarios(scenarios) + lint_prompts(prompts), None
    if replies:
        problems += lint_bank(bank, wanted) + _unmatched(groups, bank)
        measured = contamination_of_bank(bank, wanted)
        problems += lint_contamination(measured, most) if most is not None else []
    if against:
        problems += once(overlap_of_texts(_texts(against), _texts(file)), overlap_of_situations(read_events(against), scenarios))
    sides = _split(file, scenarios, *split, seed) if split else {}
    summary = _summary(file, scenarios, prompts, bank, measured, sides)
    if as_json:
        summary["problems"] = [{"where": p.where, "rule": p.rule, "message": p.message} for p in problems]
        typer.echo(json.dumps(summary, ensure_ascii=False))
    else:
        _print_summary(summary)
        _print_problems(problems)
    if problems:
        raise typer.Exit(1)


def _texts(file: Path) -> dict[str, str]:
    """Id -> what a scenario with its events, or a prompt, says."""
    from emosteer.scenarios.prompt_sets import read_events, read_groups

    told = {scenario.id: " ".join([scenario.text, *scenario.events.values()]) for scenario in read_events(file)}
    return told | {group.key.scenario: group.said for group in read_groups(file) if not group.key.valence}


def _unmatched(groups: Sequence[Group], bank: Bank) -> list[Problem]:
    """Replies to groups that the scenario file does not hold, and groups that nothing replies to."""
    from emosteer.scenarios.lints import Problem

    keys = {group.key for group in groups}
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
    from emosteer.scenarios.scripts import word_count

    counts = [word_count(text) for text in texts]
    return {"min": min(counts), "mean": round(sum(counts) / len(counts), 1), "max": max(counts)}


def _summary(
    file: Path,
    scenarios: Sequence[Scenario],
    prompts: Sequence[Group],
    bank: Bank,
    measured: Contamination | None,
    sides: dict[Path, list[Scenario]],
) -> dict[str, Any]:
    from emosteer.scenarios.scenarios import VALENCES

    words: dict[str, dict[str, float]] = {}
    if scenarios:
        words["scenario"] = _spread([s.text for s in scenarios])
        words |= {f"event.{valence}": _spread([s.events[valence] for s in scenarios]) for valence in VALENCES}
    if prompts:
        words["prompt"] = _spread([prompt.text for prompt in prompts])
    summary: dict[str, Any] = {
        "file": str(file),
        "scenarios": len(scenarios),
        "groups": len(scenarios) * len(VALENCES) + len(prompts),
        "themes": dict(Counter(s.theme for s in scenarios)),
        "words": words,
        **({"kinds": dict(Counter(prompt.kind for prompt in prompts))} if prompts else {}),
    }
    if bank:
        texts: dict[str, list[str]] = {}
        for answers in bank.values():
            for emotion, text in answers.items():
                texts.setdefault(emotion, []).append(text)
        summary["replies"] = {emotion: {"count": len(said), "words": _spread(said)} for emotion, said in texts.items()}
    if measured is not None:
        summary["contamination"] = _shares(measured)
    if sides:
        summary["written"] = {
            str(path): {"scenarios": len(side), "themes": dict(Counter(s.theme for s in side))} for path, side in sides.items()
        }
    return summary


def _shares(measured: Contamination) -> dict[str, Any]:
    """What is said of contamination: `scenarios.contamination.Contamination`, rounded."""
    return {
        **{name: round(getattr(measured, name), 4) for name in ("accuracy", "subject", "chance")},
        "by_emotion": {emotion: round(share, 4) for emotion, share in measured.by_emotion.items()},
        "overused": {emotion: [row.word for row in rows] for emotion, rows in measured.overused.items()},
        "phrases": {emotion: round(share, 4) for emotion, share in measured.phrases.items()},
        "n": measured.n,
    }


def _print_summary(summary: dict[str, Any]) -> None:
    written = summary.get("written", {})
    typer.echo(f"{summary['file']}: {summary['scenarios']} scenarios, {summary['groups']} groups")
    rows = [[theme or "(none)", n, *(side["themes"].get(theme, 0) for side in written.values())] for theme, n in summary["themes"].items()]
    if rows:
        _table(["theme", "scenarios", *(Path(path).stem for path in written)], rows)
    if "kinds" in summary:
        _table(["kind", "prompts"], list(summary["kinds"].items()))
    _table(["words", "min", "mean", "max"], [[part, *spread.values()] for part, spread in summary["words"].items()])
    if "replies" in summary:
        rows = [[emotion, found["count"], *found["words"].values()] for emotion, found in summary["replies"].items()]
        _table(["emotion", "replies", "min words", "mean", "max"], rows)
    if "contamination" in summary:
        _print_contamination(summary["contamination"])
    for path, side in written.items():
        typer.echo(f"wrote {path}: {side['scenarios']} scenarios")


def _print_contamination(found: dict[str, Any]) -> None:
    shares = {name: f"{100 * found[name]:.1f} %" for name in ("accuracy", "subject", "chance")}
    typer.echo(
        f"topic contamination: content words alone name the emotion of {shares['accuracy']} of held-out replies, subject words "
        f"{shares['subject']} (chance {shares['chance']}; n {found['n']})"
    )
    rows = [
        [emotion, f"{100 * share:.1f}", f"{100 * found['phrases'][emotion]:.1f}", ", ".join(found["overused"][emotion])]
        for emotion, share in found["by_emotion"].items()
    ]
    _table(["emotion", "named in %", "shared phrases in %", "over-used words"], rows)


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
    model: str,
    api_key_env: str,
    seed: int,
    attempts: int,
    temperature: float,
    dry_run: bool,
    as_json: bool,
) -> None:
    from emosteer.api.costs.cost import of_author
    from emosteer.base import progress
    from emosteer.scenarios.author_prompts import THEMES
    from emosteer.scenarios.authoring import AuthorEvent, author_scenarios

    held = 0
    with contextlib.suppress(OSError):  # no file yet; whatever else is wrong with it is told by the run
        held = min(out.read_bytes().count(b"\n"), count)
    writer = None if dry_run else _writer(base_url, model, api_key_env, temperature)
    with (
        announced(lambda: of_author(count, held, attempts, ANSWER_TOKENS, base_url is not None), dry_run, as_json),
        progress.bar("scenarios", count, held) as advance,
    ):

        def show(event: AuthorEvent) -> None:
            nonlocal held
            advance(event.held - held)
            held = event.held
            if event.kind != "accepted":
                progress.note(f"{event.kind}: {event.message}")

        assert writer is not None  # a dry run has ended
        report = author_scenarios(writer, domain, count, out, THEMES if themes is None else themes, None, seed, attempts, show)
    _print_report(report, out, as_json)
    if report.interrupted:
        raise typer.Exit(130)


def _writer(base_url: str | None, model: str, api_key_env: str, temperature: float) -> ScenarioAuthor:
    """The author at an endpoint, or a local model.

    Raises:
        UsageError: if the model is an address, or the named key is not there.
    """
    import os

    from emosteer.base import progress
    from emosteer.scenarios.authoring import LocalAuthor, OpenAIAuthor

    if base_url is None:
        if "://" in model:
            raise UsageError("--model is a URL; give the address as --base-url, and the model's name there as --model")
        from emosteer.generation.generate import completer

        return LocalAuthor(completer(model, temperature=temperature, max_new_tokens=ANSWER_TOKENS))
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
