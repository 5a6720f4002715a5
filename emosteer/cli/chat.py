"""`emosteer chat`: talk to a steered model in the terminal, or through a pipe, a line each."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from emosteer.api.chat import Chat, completions
from emosteer.api.options import WritingOptions
from emosteer.base import stopping
from emosteer.base.errors import DataError, EmosteerError, UsageError
from emosteer.base.progress import note
from emosteer.base.tables import print_table
from emosteer.circuits.places import ARTIFACTS
from emosteer.cli.options import (
    DEFAULT_MODEL,
    BestOfOption,
    DeviceMapOption,
    DeviceOption,
    DtypeOption,
    ModelOption,
    NoExamplesOption,
    PenalisePromptOption,
    RootOption,
    SeedOption,
)
from emosteer.generation.decoding import GUIDANCE, MAX_TOKENS, Decoding
from emosteer.judges.reader import Reader
from emosteer.judges.registry import EMBEDDED

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession

    from emosteer.judges.protocol import EmotionJudge, SoundnessJudge

#: What `--judge` takes for nobody.
NOBODY = "none"


def chat(
    model: ModelOption = DEFAULT_MODEL,
    emotion: Annotated[str | None, typer.Option("--emotion", "-e", help="What it feels at first.", show_default=False)] = None,
    intensity: Annotated[float | None, typer.Option(help="-100 to 100; needs `calibrate`.", show_default=False)] = None,
    mix: Annotated[str | None, typer.Option(help="Or several: 'sadness:40 + anger:20'.", metavar="MIXTURE", show_default=False)] = None,
    arc: Annotated[str | None, typer.Option(help="Or in turn: 'fear:80 -> happiness:60'.", metavar="ARC", show_default=False)] = None,
    system: Annotated[str, typer.Option(help="A line that tells the model how to speak.")] = "",
    circuit: Annotated[Path | None, typer.Option(help="Circuit file; else artifacts/, else the shipped one.", metavar="FILE")] = None,
    auto: Annotated[bool, typer.Option("--auto", help="Make directions and circuit first where they are missing.")] = False,
    judge: Annotated[str, typer.Option(help=f"Who reads replies, and you for a personality; {NOBODY} for nobody.")] = EMBEDDED,
    max_new_tokens: Annotated[int, typer.Option(max=MAX_TOKENS, help="Longest reply, in tokens.")] = Decoding.max_new_tokens,
    temperature: Annotated[float, typer.Option(max=100, help="0 is greedy.")] = Decoding.temperature,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling; 1 is all.")] = Decoding.top_p,
    repetition_penalty: Annotated[float, typer.Option(max=100, help="1 is none.")] = Decoding.repetition_penalty,
    guidance: Annotated[float, typer.Option(max=100, help="How far replies lean towards what you say; 1 is none.")] = GUIDANCE,
    instruction: Annotated[
        str | None, typer.Option(help="Appended to what you say, '' for nothing; the circuit's own if not given.", show_default=False)
    ] = None,
    penalise_prompt: PenalisePromptOption = False,
    no_examples: NoExamplesOption = False,
    best_of: BestOfOption = Decoding.best_of,
    seed: SeedOption = Decoding.seed,
    device: DeviceOption = "auto",
    device_map: DeviceMapOption = None,
    dtype: DtypeOption = "auto",
    root: RootOption = ARTIFACTS,
) -> None:
    """Talk to a steered model; /help shows what can be changed on the way: /emotion fear 60, /mix, /arc, /compare, /undo, /save.

    Ctrl-C ends a reply, Ctrl-D the chat. Without a terminal, lines are read from stdin.
    """
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive and find_spec("prompt_toolkit") is None:
        raise UsageError("the chat needs prompt_toolkit in a terminal; install it with: pip install 'emosteer[chat]'")
    if sum(given is not None for given in (emotion, mix, arc)) > 1:
        raise UsageError("expected one of --emotion, --mix and --arc")
    if intensity is not None and emotion is None:
        raise UsageError("--intensity has no meaning without --emotion")
    chosen: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    chosen |= {"repetition_penalty": repetition_penalty, "guidance": guidance, "seed": seed, "penalise_prompt": penalise_prompt}
    chosen["best_of"] = best_of
    Decoding(**chosen)
    from emosteer.api.loading import load

    loaded = load(model, circuit=circuit, auto=auto, artifacts=root, device=device, dtype=dtype, device_map=device_map)
    if loaded.circuit is None:
        from emosteer.circuits.places import require_circuit

        require_circuit(loaded.model, circuit, root)
    own = {} if instruction is None else {"instruction": instruction}
    if no_examples and loaded.circuit is not None:
        loaded = replace(loaded, circuit=loaded.circuit.without_examples())
    options: WritingOptions = {**chosen, **own}  # type: ignore[typeddict-item]
    reader = _Reader(judge)
    talk = Chat(loaded, options, reader.shares, system)
    first = {"emotion": f"{emotion} {intensity:g}" if intensity is not None else emotion, "mix": mix, "arc": arc}
    for name, given in first.items():
        if given is not None:
            note(talk.command(f"/{name} {given}"))
    lines = _typed(talk, reader) if interactive else _piped()
    if interactive:
        typer.echo(f"{loaded.model.name} {talk.label}; /help shows the commands")
    _talk(talk, reader, lines, interactive)


def _piped() -> Iterator[str]:
    """The lines of stdin.

    Raises:
        DataError: if they are no UTF-8 text.
    """
    try:
        for line in sys.stdin:
            yield line.rstrip("\n")
    except UnicodeDecodeError as error:
        raise DataError("stdin is not UTF-8 text; convert it first") from error


class _Reader:
    """Who reads, and what was said of the last reply."""

    def __init__(self, spec: str) -> None:
        self.reader = None if spec == NOBODY else Reader(spec)
        self.last = ""

    def shares(self, texts: Sequence[str]) -> list[dict[str, float]]:
        if self.reader is None:
            raise UsageError("a personality needs a judge that reads what you say; leave --judge none out")
        return self.reader.shares(texts)

    def read(self, texts: list[str]) -> list[str]:
        """Of each text the likeliest labels and whether it is sound, in words; nothing where nobody reads. A judge that cannot be had is
        told once, and costs no reply."""
        if self.reader is None:
            return [""] * len(texts)
        try:
            return self._read(*self.reader.judges(), texts)
        except (EmosteerError, OSError) as error:
            self.reader = None
            note(f"no judge reads the replies: {error}")
            return [""] * len(texts)

    @staticmethod
    def _read(judge: EmotionJudge, check: SoundnessJudge, texts: list[str]) -> list[str]:
        said = []
        for opinion, sound in zip(judge.opinions(texts), check.check(texts), strict=True):
            shares = sorted((opinion.probabilities or {}).items(), key=lambda pair: -pair[1])[:2]
            words = ", ".join(f"{label} {share:.0%}" for label, share in shares)
            said.append(f"{words}{'' if sound.sound else ', not sound'}")
        return said


def _talk(talk: Chat, reader: _Reader, lines: Iterable[str], interactive: bool) -> None:
    for line in lines:
        if not line.strip():
            continue
        try:
            if not _carry_out(talk, reader, line.strip(), interactive):
                return
        except EmosteerError as error:
            if not interactive:
                raise
            typer.echo(f"{error}", err=True)


def _carry_out(talk: Chat, reader: _Reader, line: str, interactive: bool) -> bool:
    """A text or a command. Returns whether to go on."""
    name, _, rest = line[1:].partition(" ") if line.startswith("/") else ("", "", "")
    if line == "/quit":
        return False
    if name == "compare":
        _compare(talk, reader, rest.strip())
    elif line == "/retry":
        if not talk.turns:
            raise UsageError("there is nothing to write again")
        said = talk.turns[-1].said
        before, last, since = talk.turns[:-1], talk.turns[-1], talk.felt_since
        talk.command("/undo")
        try:
            _say(talk, reader, said, interactive)
        finally:
            if len(talk.turns) == len(before):  # nothing new: what was there stays
                talk.turns.append(last)
                talk.felt_since = since
    elif line.startswith("/"):
        typer.echo(talk.command(line))
    else:
        _say(talk, reader, line, interactive)
    return True


def _say(talk: Chat, reader: _Reader, text: str, interactive: bool) -> None:
    before = len(talk.turns)
    pieces = talk.reply(text)
    try:
        for piece in pieces:
            typer.echo(piece, nl=False)
    except KeyboardInterrupt:
        if not interactive:
            raise
        stopping.forgiven()
        pieces.close()  # type: ignore[attr-defined]
    typer.echo("")
    reader.last = ""
    if len(talk.turns) > before:
        [reader.last] = reader.read([talk.turns[-1].reply])
        if reader.last and not interactive:
            note(f"({talk.turns[-1].felt}; read as {reader.last})")


def _compare(talk: Chat, reader: _Reader, text: str) -> None:
    said = text or (talk.turns[-1].said if talk.turns else "")
    if not said:
        raise UsageError("expected a text to compare replies to: /compare TEXT")
    if not text:
        last = talk.turns.pop()
        try:
            replies = talk.compare(said)
        finally:
            talk.turns.append(last)
    else:
        replies = talk.compare(said)
    read = reader.read([reply.text for _, reply in replies])
    rows = [[emotion, reply.text, how] for (emotion, reply), how in zip(replies, read, strict=True)]
    print_table(["feels", "reply", "read as"], rows)


def _typed(talk: Chat, reader: _Reader) -> Iterator[str]:
    """Lines typed in a terminal. Ctrl-C takes back the line, Ctrl-D ends."""
    session = _session(talk, reader)
    while True:
        try:
            with stopping.handed_over():
                line: str = session.prompt("> ")
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
        yield line


def _session(talk: Chat, reader: _Reader) -> PromptSession[str]:
    """A prompt with a history, completion and a status line."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion
    from prompt_toolkit.document import Document

    class Words(Completer):
        def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
            line = document.text_before_cursor
            for found in completions(line, talk.model.emotions):
                yield Completion(found, start_position=-len(line.rpartition(" ")[2]))

    def status() -> str:
        read = f"  |  last reply read as {reader.last}" if reader.last else ""
        return f" feels {talk.label}{read}  |  {len(talk.turns)} turns"

    return PromptSession(completer=Words(), complete_while_typing=False, bottom_toolbar=status)
