"""`emosteer judge`: blind opinions and soundness for every line of a file. Imports are inside: --help is instant."""

from __future__ import annotations

import contextlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from emosteer.base.errors import DataError, EmosteerError, UsageError
from emosteer.cli.announce import DryRunOption, announced
from emosteer.cli.by_hand import HandOptions, read_by_hand
from emosteer.cli.command_line import typed
from emosteer.cli.options import DeviceOption, PanelOption
from emosteer.judges.registry import KEY_ENV, PANEL, PARALLEL, JudgeSpec

if TYPE_CHECKING:
    from emosteer.base.jsonl import JsonlLog
    from emosteer.judges.protocol import EmotionJudge, Opinion, Soundness
    from emosteer.judges.soundness import SoundnessCheck

#: Texts judged before their rows are written; a kill costs no more.
CHUNK = 256
#: Texts from which on the judging says before it begins what it will cost.
MANY = 256
#: Where --help lists what belongs to --by-hand.
HAND = "Reading by hand"
JudgedRow = dict[str, Any]


@dataclass(frozen=True)
class Line:
    """One text to judge. given: the label that the input carries, for the summary alone; sha256: of the text."""

    id: str
    text: str
    given: str | None
    sha256: str


def judge(
    context: typer.Context,
    file: Annotated[str, typer.Argument(metavar="FILE.jsonl", help="One object with a text a line; '-' reads stdin.")],
    spec: PanelOption = PANEL,
    base_url: Annotated[
        str | None, typer.Option(help="Of an OpenAI-compatible endpoint, e.g. http://127.0.0.1:8000/v1.", show_default=False)
    ] = None,
    key_env: Annotated[str, typer.Option(help="The environment variable that holds its key.")] = KEY_ENV,
    parallel: Annotated[int, typer.Option(min=1, max=64, help="Requests to it at a time.")] = PARALLEL,
    cache: Annotated[
        Path | None, typer.Option(help="Where its answers are kept; the cache folder if not given.", metavar="FILE", show_default=False)
    ] = None,
    field: Annotated[str, typer.Option(help="The field that holds the text.")] = "text",
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write one verdict a line; a rerun goes on.", metavar="FILE.jsonl", show_default=False),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Replace --out instead of going on.")] = False,
    device: DeviceOption = "auto",
    dry_run: DryRunOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line instead of a summary.")] = False,
    by_hand: Annotated[
        bool, typer.Option("--by-hand", help="Read the texts yourself, blind, a key each; --out keeps the labels.", rich_help_panel=HAND)
    ] = False,
    score: Annotated[bool, typer.Option("--score", help="Score the judges against the labels now.", rich_help_panel=HAND)] = False,
    against: Annotated[
        Path | None,
        typer.Option(help="Compare with another reader's labels.", metavar="LABELS.jsonl", show_default=False, rich_help_panel=HAND),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(min=1, max=1_000_000, help="Read this many, evenly over the targets.", show_default=False, rich_help_panel=HAND),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="The order and the draw follow from it.", rich_help_panel=HAND)] = 0,
    show_prompt: Annotated[bool, typer.Option("--show-prompt", help="Show the prompt above the reply.", rich_help_panel=HAND)] = False,
    answers: Annotated[
        bool, typer.Option("--answers", help="Also ask whether the reply answers its prompt.", rich_help_panel=HAND)
    ] = False,
    reader: Annotated[
        str | None, typer.Option(help="Your name, kept with each label.", metavar="NAME", show_default=False, rich_help_panel=HAND)
    ] = None,
) -> None:
    """Judge texts: which emotion each voices, and whether it is sound text. Judges see the text alone; of several, their mean decides.

    A judge that failed leaves the emotion null, or to the other judges, with the problem beside it; the same command asks it again.
    A label of the input (emotion or label) is only compared.
    With --by-hand a person judges the same way, and the judges are scored against them.
    """
    hand = HandOptions(out, score, against, count, seed, show_prompt, answers, reader, as_json)
    if by_hand:
        if dry_run:
            raise UsageError("--dry-run has no meaning with --by-hand: how long reading takes is for you to say")
        if file == "-" or fresh:
            problem = "--by-hand reads keys from stdin" if file == "-" else "--fresh would throw labels away"
            raise UsageError(f"{problem}; {'name a FILE.jsonl' if file == '-' else 'name another --out instead'}")
        make = _maker(spec, base_url=base_url, key_env=key_env, cache=cache, parallel=parallel, device=device)
        return read_by_hand(file, _rows(file, field), spec, make, hand)
    hand.refuse()
    if typed(context, ("seed",)):
        raise UsageError("--seed has a meaning with --by-hand only; add --by-hand or leave it out")
    if fresh and out is None:
        raise UsageError("--fresh replaces --out FILE.jsonl, and none is named; add it, or leave --fresh out")
    lines = _lines(file, field)
    if out is not None and file != "-" and out.exists() and out.samefile(file):
        raise UsageError(f"--out {out} is the input file; name another one")
    from emosteer.judges.registry import close_judges, judge_of, make_judges, specs_of
    from emosteer.judges.soundness import SoundnessCheck

    panel = make_judges(spec, base_url=base_url, key_env=key_env, cache=cache, parallel=parallel, device=device)
    chosen = judge_of(panel)
    check = SoundnessCheck.load(encoder=next((one.encoder for one in panel if hasattr(one, "encoder")), None))
    run = _run_key(chosen, check)
    log = _opened(out, run, fresh) if out is not None and not dry_run else None
    rows = log.rows if log is not None else _rows_there(out, run, fresh)
    # what was missing is judged again
    known = {row["text_sha256"]: row for row in rows if not row["problem"]}
    paid = [one for one, name in zip(panel, specs_of(spec), strict=True) if JudgeSpec.parse(name).remote]
    show = _printer(lines) if as_json and not dry_run else lambda known: None
    try:
        with _announced(lines, known, panel, paid, check, out is not None, dry_run, as_json):
            show(known)
            for rows in _judged(lines, known, chosen, check.check, run, max(CHUNK, 16 * parallel)):
                if log is not None:
                    for row in rows:
                        log.append(row)
                show(known)
    finally:
        if log is not None:
            log.close()
        close_judges(panel)
    found = [{**known[line.sha256], "id": line.id} for line in lines]
    if out is not None:
        _settle(out, found)
    if not as_json:
        _summary(chosen.name, lines, found, out)
    problems = [row["problem"] for row in found if row["problem"]]
    if all(row["emotion"] is None for row in found):
        raise EmosteerError(f"no text could be judged: {problems[-1]}")
    if problems and as_json:
        from emosteer.base.progress import note

        note(f"{len(problems)} of {len(found)} opinions are missing or lack a judge (last problem: {problems[-1]})")


# ---- input ---------------------------------------------------------------------------------------------------------


def _lines(file: str, field: str) -> list[Line]:
    """The texts of a file or of stdin; raises as `_rows`."""
    from emosteer.base.files import sha256_text

    lines = []
    for number, text, row in _rows(file, field):
        given = next((row[name] for name in ("emotion", "label") if isinstance(row.get(name), str) and name != field), None)
        lines.append(Line(str(row.get("id", f"line-{number}")), text, given, sha256_text(text)))
    return lines


def _rows(file: str, field: str) -> list[tuple[int, str, dict[str, Any]]]:
    """Line number, text and all fields of every line of a file or of stdin.

    Raises:
        UsageError: if nothing is piped. DataError: naming the line, if one is malformed or lacks the field.
    """
    from emosteer.base.files import parse_jsonl, read_jsonl

    if file == "-":
        if sys.stdin.isatty():
            raise UsageError("expected objects with a text on stdin, one a line, or a FILE.jsonl")
        try:
            rows = list(parse_jsonl(sys.stdin.read(), "stdin"))
        except UnicodeDecodeError as error:
            raise DataError("stdin is not UTF-8 text; convert it first") from error
        if not rows:
            raise DataError("stdin is empty; expected one JSON object a line")
    else:
        rows = list(read_jsonl(Path(file), "input file"))
    complete = []
    for number, row in rows:
        where = f"{'stdin' if file == '-' else file}:{number}"
        text = row.get(field)
        if not isinstance(text, str):
            what = f"'{field}' as {type(text).__name__}" if field in row else ", ".join(row) or "no field at all"
            texts = [name for name in row if name != field and isinstance(row[name], str)]
            hint = next((name for name in ("text", "gen_text", "reply", "response") if name in texts), "NAME")
            raise DataError(f"{where}: expected the text in a field '{field}', found {what}; name its field with --field {hint}")
        # half a character could be neither sent nor written
        complete.append((number, text.encode("utf-8", "replace").decode("utf-8"), row))
    return complete


def _maker(specs: str, *, base_url: str | None, cache: Path | None, **options: Any) -> Callable[[str], EmotionJudge]:
    """Makes the judges of a list one by one; an endpoint's address and cache go to the endpoints, and to all where there is none, to be
    refused."""
    from emosteer.judges.registry import make_judge

    def endpoint(spec: str) -> bool:
        return JudgeSpec.parse(spec).remote or not any(JudgeSpec.parse(one).remote for one in specs.split(","))

    def make(spec: str) -> EmotionJudge:
        return make_judge(spec, base_url=base_url if endpoint(spec) else None, cache=cache if endpoint(spec) else None, **options)

    return make


def _announced(
    lines: Sequence[Line],
    known: Mapping[str, JudgedRow],
    panel: Sequence[EmotionJudge],
    paid: Sequence[EmotionJudge],
    check: SoundnessCheck,
    written: bool,
    dry_run: bool,
    as_json: bool,
) -> contextlib.AbstractContextManager[None]:
    """The judging with what it costs said before it, where that is asked for or there are many texts."""
    from emosteer.api.costs.replies import of_judge

    texts = {line.sha256: line.text for line in lines}
    left = [text for sha256, text in texts.items() if sha256 not in known]
    if not dry_run and len(left) < MANY:
        return contextlib.nullcontext()
    return announced(lambda: of_judge(panel, paid, check.check, list(texts.values()), left, written), dry_run, as_json)


# ---- judging -------------------------------------------------------------------------------------------------------


def _judged(
    lines: Sequence[Line],
    known: dict[str, JudgedRow],
    judge: EmotionJudge,
    check: Callable[[Sequence[str]], Sequence[Soundness]],
    run: str,
    chunk: int,
) -> Iterator[list[JudgedRow]]:
    """Judges every text that is not known, each once; yields the rows of a chunk at a time and puts them into `known`, by text."""
    from emosteer.base.progress import bar, note

    todo = list({line.sha256: line for line in lines if line.sha256 not in known}.values())
    there = len({line.sha256 for line in lines}) - len(todo)
    if there:
        note(f"going on: {there} of {there + len(todo)} texts are judged")
    with bar("judge (texts)", there + len(todo), there) as advance:
        for start in range(0, len(todo), chunk):
            some = todo[start : start + chunk]
            texts = [line.text for line in some]
            opinions = judge.opinions(texts, lambda index, opinion: advance(1))
            rows = [_row(*parts, run) for parts in zip(some, opinions, check(texts), strict=True)]
            known.update({line.sha256: row for line, row in zip(some, rows, strict=True)})
            yield rows


def _row(line: Line, opinion: Opinion, soundness: Soundness, run: str) -> JudgedRow:
    from emosteer.scenarios.scenarios import EMOTIONS

    shares = opinion.probabilities
    return {
        "id": line.id,
        "emotion": opinion.emotion(),
        "six": opinion.emotion(EMOTIONS),
        "probabilities": None if shares is None else {label: round(share, 6) for label, share in shares.items()},
        "sound": soundness.sound,
        "reasons": list(soundness.reasons),
        "problem": opinion.problem,
        "text_sha256": line.sha256,
        "run": run,
    }


def _run_key(judge: EmotionJudge, check: object) -> str:
    from emosteer.base.files import sha256_text

    return sha256_text(json.dumps([judge.key, str(getattr(check, "key", ""))]))[:12]


# ---- output --------------------------------------------------------------------------------------------------------


def _opened(out: Path, run: str, fresh: bool) -> JsonlLog:
    """The output file, with what an earlier run has judged.

    Raises:
        UsageError: if it holds something else than verdicts of this judge. EmosteerError: if it cannot be written.
    """
    from emosteer.base.jsonl import JsonlLog

    if fresh and out.is_file():
        out.unlink()
    log = JsonlLog(out, first_key="id")
    _refuse_others(out, log.rows, run)
    return log


def _refuse_others(out: Path, rows: Sequence[JudgedRow], run: str) -> None:
    """Raises UsageError if a file's rows are not all verdicts of this judge."""
    if any(row.get("run") != run for row in rows):
        raise UsageError(f"{out} holds something else than verdicts of this judge; name another --out, or --fresh to replace it")


def _rows_there(out: Path | None, run: str, fresh: bool) -> list[JudgedRow]:
    """What an earlier run has judged, read without opening the file to write. Raises what `_opened` raises of its rows."""
    from emosteer.base.jsonl import whole_rows

    if out is None or fresh or not out.is_file():
        return []
    rows = whole_rows(out)
    _refuse_others(out, rows, run)
    return rows


def _settle(out: Path, found: Sequence[JudgedRow]) -> None:
    """Puts the finished file into the order of the input, without what it does not hold any more."""
    from emosteer.base.files import read_jsonl, write_jsonl

    if [row for _, row in read_jsonl(out, "output file", may_be_empty=True)] != list(found):
        write_jsonl(out, list(found))


def _printer(lines: Sequence[Line]) -> Callable[[dict[str, JudgedRow]], None]:
    """Prints rows in the order of the input, each as soon as it and all before it are there."""
    printed = 0

    def show(known: dict[str, JudgedRow]) -> None:
        nonlocal printed
        while printed < len(lines) and lines[printed].sha256 in known:
            line = lines[printed]
            typer.echo(json.dumps({**known[line.sha256], "id": line.id}, ensure_ascii=False))
            printed += 1

    return show


def _summary(name: str, lines: Sequence[Line], found: Sequence[JudgedRow], out: Path | None) -> None:
    from emosteer.base.tables import print_table
    from emosteer.judges.panel import UNDECIDED
    from emosteer.judges.protocol import LABELS

    total = len(found)
    judged = Counter(row["emotion"] for row in found)
    sound = Counter(row["emotion"] for row in found if row["sound"])
    typer.echo(f"{total} text{'s' * (total != 1)} judged by {name}" + (f" -> {out}" if out is not None else ""))
    rows = [
        (label or "missing", judged[label], _percent(judged[label], total), judged[label] - sound[label])
        for label in (*LABELS, UNDECIDED, None)
    ]
    print_table(("judged", "texts", "share", "unsound"), [*rows, ("all", total, _percent(total, total), total - sum(sound.values()))])
    reasons = Counter(reason for row in found for reason in row["reasons"])
    if reasons:
        typer.echo("reasons and remarks: " + ", ".join(f"{reason} {n}" for reason, n in reasons.most_common()))
    problems = Counter(
        ("missing" if row["emotion"] is None else "without one of the judges", row["problem"]) for row in found if row["problem"]
    )
    for (what, problem), n in problems.most_common(3):
        typer.echo(f"{n} {what}: {problem}")
    _agreement(lines, found)


def _agreement(lines: Sequence[Line], found: Sequence[JudgedRow]) -> None:
    """Agreement with the labels that the input carries, and which was taken for which."""
    from emosteer.base.tables import print_table
    from emosteer.judges.panel import UNDECIDED
    from emosteer.judges.protocol import LABELS
    from emosteer.scenarios.emotions import NEUTRAL, emotion_key

    columns = (*LABELS, UNDECIDED)
    given = [emotion_key(line.given) if line.given is not None else None for line in lines]
    pairs = [(label, row) for label, row in zip(given, found, strict=True) if label in LABELS]
    if not pairs:
        return
    there = [(str(label), row) for label, row in pairs if row["emotion"] is not None]
    emotional = [(label, row) for label, row in there if label != NEUTRAL]
    seven, six = sum(label == row["emotion"] for label, row in there), sum(label == row["six"] for label, row in emotional)
    other = sum(label is not None and label not in LABELS for label in given)
    typer.echo(
        f"\nagreement with the given label: {_percent(six, len(emotional))} of {len(emotional)} six-way, "
        f"{_percent(seven, len(there))} of {len(there)} with neutral; {len(pairs) - len(there)} missing"
        + (f"; {other} with labels that are none of ours" if other else "")
    )
    confusion = Counter((label, row["emotion"]) for label, row in there)
    rows = [(label, *(confusion[label, one] for one in columns)) for label in LABELS if any(label == one for one, _ in there)]
    print_table(("given \\ judged", *columns), rows)


def _percent(part: int, total: int) -> str:
    return f"{100 * part / total:.1f} %" if total else "-"
