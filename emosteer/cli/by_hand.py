"""`emosteer judge --by-hand`: a person reads the texts. The dialogue is on stderr, results are on stdout; nothing is coloured."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from emosteer.base.errors import DataError, EmosteerError, UsageError
from emosteer.judges import by_hand as bench
from emosteer.judges.by_hand import Card, HandLabel, LabelLog, Question, Row, Sheet
from emosteer.judges.registry import JudgeSpec

if TYPE_CHECKING:
    from emosteer.judges.protocol import EmotionJudge, Opinion, Soundness

#: The widest that a text is shown on a terminal; longer lines are tiring to read.
WIDEST = 100


@dataclass(frozen=True)
class HandOptions:
    """What the command line says beside the file; each has a meaning with --by-hand only, but `out` and `as_json`."""

    out: Path | None = None
    score: bool = False
    against: Path | None = None
    count: int | None = None
    seed: int = 0
    show_prompt: bool = False
    answers: bool = False
    reader: str | None = None
    as_json: bool = False

    def refuse(self) -> None:
        """For a command without --by-hand.

        Raises:
            UsageError: if one of them was given.
        """
        names = ("score", "against", "count", "show_prompt", "answers", "reader")
        for name in names:
            if getattr(self, name) not in (None, False):
                raise UsageError(f"--{name.replace('_', '-')} has a meaning with --by-hand only; add --by-hand or leave it out")


def read_by_hand(
    file: str, rows: Sequence[tuple[int, str, Row]], specs: str, make: Callable[[str], EmotionJudge], options: HandOptions
) -> None:
    """Labels texts by hand, or scores the labels.

    Args:
        rows: line number, text and all fields of each line of the file; specs: the judges to score, with commas between them.
    """
    names = _parsed(specs)
    sheet = bench.sheet_of([(text, row) for _, text, row in rows])
    path = options.out if options.out is not None else bench.labels_path(Path(file))
    if path.exists() and path.samefile(file):
        raise UsageError(f"--out {path} is the input file; name another one")
    scored = options.score
    if not (options.score or options.against):
        _check_prompts(file, rows, options)
        scored = _labelled(sheet, path, options)
    if not (scored or options.against):
        return
    labels = bench.read_labels(path, sheet)
    result: Row = {"file": file, "labels_file": str(path)}
    if scored:
        result |= _scored(sheet, labels, names, make)
    if options.against is not None:
        from emosteer.judges.by_hand_scores import compare

        result["against"] = {"file": str(options.against), **compare(labels, bench.read_labels(options.against, sheet))}
    if options.as_json:
        typer.echo(json.dumps(result, ensure_ascii=False))
    else:
        from emosteer.cli.print_by_hand import print_scores

        print_scores(result)


def _parsed(specs: str) -> list[str]:
    """The judges of a list, checked before anybody reads a hundred texts for them."""
    from emosteer.judges.registry import make_judge

    names = [spec.strip() for spec in specs.split(",")]
    for spec in names:
        if not JudgeSpec.parse(spec).known:
            make_judge(spec)  # says what is wrong with it
    if len(set(names)) < len(names):
        raise UsageError(f"expected every judge once, found --judge {specs}; leave out the repeated one")
    return names


def _check_prompts(file: str, rows: Sequence[tuple[int, str, Row]], options: HandOptions) -> None:
    needs = "--answers" if options.answers else "--show-prompt" if options.show_prompt else None
    lacking = next((number for number, _, row in rows if not isinstance(row.get("prompt"), str)), None)
    if needs is not None and lacking is not None:
        raise DataError(f"{file}:{lacking}: expected a text in a field 'prompt', found none; {needs} needs the prompt of every line")


# ---- labelling -----------------------------------------------------------------------------------------------------


def _labelled(sheet: Sheet, path: Path, options: HandOptions) -> bool:
    """Asks until all are labelled (True) or the reader stops."""
    cards = bench.draw(sheet, options.seed, options.count)
    log = LabelLog(path, sheet, options.reader)
    with closing(log):
        terminal = sys.stdin.isatty()
        reader = Reader(terminal, options.show_prompt or options.answers, _key if terminal else _line)
        done = bench.read_cards(cards, log, reader.ask, options.answers)
        count = sum(card.sha256 in log.labels for card in cards)
    if not done:
        if reader.silent and not terminal:
            raise UsageError("expected a terminal, or one label a line on stdin, found neither; run it in a terminal")
        _tell(f"{count} of {len(cards)} texts are labelled -> {path}; the same command goes on")
    return done


def _key() -> str | None:
    """One key of the terminal; None where it was closed (Ctrl-D)."""
    try:
        return typer.getchar() or None
    except EOFError:
        return None


def _line() -> str | None:
    """One line of stdin; None at its end."""
    try:
        return sys.stdin.readline() or None
    except UnicodeDecodeError as error:
        raise DataError("stdin is not UTF-8 text; give one label a line") from error


@dataclass
class Reader:
    """The person at the keyboard, or whatever writes lines to stdin. silent: nothing was ever said; shown: the card on the screen."""

    terminal: bool
    show_prompt: bool
    listen: Callable[[], str | None]
    silent: bool = True
    shown: Card | None = None
    told_keys: bool = False

    def ask(self, question: Question) -> str:
        """Asks until the answer is one that the question has."""
        if not self.told_keys:
            _tell(_keys(question.kind))
            self.told_keys = True
        self._show(question)
        while True:
            if self.terminal:
                typer.echo("> ", nl=False, err=True)
            try:
                said = self.listen()
            except KeyboardInterrupt:
                _tell("")  # what is said of it stands on a line of its own
                raise
            self.silent = self.silent and said is None
            choice = bench.STOP if said is None else bench.meaning(said, question.kind)
            if self.terminal:
                _tell(choice if choice and question.kind != bench.END else "")
            if choice == bench.KEYS:
                _tell(_keys(question.kind))
            elif choice == bench.BACK and not question.back:
                _tell("there is no text before this one")
            elif choice is not None:
                return choice
            else:
                _tell(f"unknown key {said.strip() if said else ''!r}; ? shows the keys")

    def _show(self, question: Question) -> None:
        """The text, unless it is on the screen, and the question."""
        if question.kind == bench.END:
            _tell(f"\nall {question.total} are labelled; b goes back to the last one, Enter ends")
            return
        if question.kind == bench.EMOTION or self.shown != question.card:
            _tell(f"\n{question.number} of {question.total}" + (f" (now: {question.label})" if question.label else ""))
            if self.show_prompt:
                _tell(f"prompt: {self._lines(question.card.prompt or '')}\nreply:")
            _tell(self._lines(question.card.text) or "(the text is empty)")
        if question.kind == bench.ANSWERS:
            _tell("does it answer its prompt? y yes, n no")
        self.shown = question.card

    def _lines(self, text: str) -> str:
        """A text as it is shown: nothing in it can move the cursor; on a terminal, words are kept whole."""
        text = "".join(f"\\x{ord(c):02x}" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text.replace("\r\n", "\n"))
        if not self.terminal:
            return text
        width = min(WIDEST, shutil.get_terminal_size().columns)
        return "\n".join(textwrap.fill(line, width, replace_whitespace=False, break_on_hyphens=False) for line in text.split("\n"))


def _keys(kind: str) -> str:
    choices = "   ".join(f"{key} {word}" for key, word in bench.CHOICES[kind].items() if key)
    return f"{choices}   |   b back   ? keys   q stop".removeprefix("   |   ")


def _tell(line: str) -> None:
    typer.echo(line, err=True)


# ---- scoring -------------------------------------------------------------------------------------------------------


def _scored(sheet: Sheet, labels: Mapping[str, HandLabel], names: Sequence[str], make: Callable[[str], EmotionJudge]) -> Row:
    """Asks the judges, blind, for the labelled texts alone, and scores them.

    Raises:
        EmosteerError: if no judge said anything. UsageError: if two judges have one name.
    """
    from emosteer.judges.by_hand_scores import score
    from emosteer.judges.soundness import SoundnessCheck

    cards = [card for card in sheet.cards if card.sha256 in labels]
    opinions: dict[str, dict[str, Opinion]] = {}
    encoder: Any = None
    for spec in names:
        judge = make(spec)
        if judge.name in opinions:
            raise UsageError(f"expected every judge once, found {judge.name} twice in --judge {','.join(names)}; leave out one")
        opinions[judge.name] = _opinions(judge, cards)
        encoder = encoder or getattr(judge, "encoder", None)
    lost = [opinion.problem for one in opinions.values() for opinion in one.values() if opinion.probabilities is None]
    if len(lost) == len(cards) * len(names):
        raise EmosteerError(f"no text could be judged: {lost[-1]}")
    check = SoundnessCheck.load(encoder=encoder)
    verdicts: dict[str, Soundness] = dict(zip([c.sha256 for c in cards], check.check([c.text for c in cards]), strict=True))
    if lost:
        _tell(f"{len(lost)} opinions are missing (last problem: {lost[-1]})")
    return score(sheet, labels, opinions, verdicts)


def _opinions(judge: EmotionJudge, cards: Sequence[Card]) -> dict[str, Opinion]:
    from emosteer.base.progress import bar

    try:
        with bar(f"{judge.name} (texts)", len(cards)) as advance:
            opinions = judge.opinions([card.text for card in cards], lambda index, opinion: advance(1))
    finally:
        if hasattr(judge, "close"):
            judge.close()
    return {card.sha256: opinion for card, opinion in zip(cards, opinions, strict=True)}
