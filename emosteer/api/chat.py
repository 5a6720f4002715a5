"""A conversation with a steered model: what was said, what is felt, and the commands that change it. Knows no terminal; no torch here."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from emosteer.api.options import WritingOptions
from emosteer.api.steered_model import SteeredModel
from emosteer.base.errors import EmosteerError, UsageError, suggest
from emosteer.circuits.arcs import Arc
from emosteer.circuits.dial import check_intensity
from emosteer.scenarios.scenarios import NEUTRAL, Message
from emosteer.writing.feelings import Feeling, Reader

if TYPE_CHECKING:
    from emosteer.generation.generate import Reply

#: Command -> its arguments, and what it does.
COMMANDS = {
    "emotion": ("NAME [INTENSITY]", "feel one emotion, 0 to 100, below 0 less of it; /emotion neutral feels nothing"),
    "mix": ("MIXTURE", "feel several, such as /mix sadness:40 + anger:20"),
    "arc": ("ARC", "feel one after the other within each reply, such as /arc fear:80 -> happiness:60"),
    "fade": ("REPLIES", "half of what is felt is left after so many replies; /fade off"),
    "personality": ("TRAITS", "the mood follows what you say, such as /personality extraversion:0.5; /personality off"),
    "compare": ("[TEXT]", "the reply under every emotion, to a text or to what was said last"),
    "undo": ("", "take back what was said last, and its reply"),
    "retry": ("", "write the last reply again, under what is felt now"),
    "history": ("", "show the conversation"),
    "save": ("FILE", "write the conversation as a line of JSON, with what was felt"),
    "reset": ("", "begin a new conversation"),
    "help": ("", "show the commands"),
    "quit": ("", "end"),
}


@dataclass(frozen=True)
class Turn:
    """What was said, the reply, and what it felt."""

    said: str
    reply: str
    felt: str


@dataclass
class Chat:
    """A conversation. options: of writing, as `SteeredModel.generate` takes them; system: a line that tells the model how to speak; read:
    reads the user's turns, which a personality needs."""

    model: SteeredModel
    options: WritingOptions
    read: Reader
    system: str = ""
    emotion: str | None = None
    intensity: float | None = None
    feeling: Feeling = field(default_factory=Feeling)
    turns: list[Turn] = field(default_factory=list)
    felt_since: int = 0

    # ---- writing -----------------------------------------------------------------------------------------------------------------

    def messages(self, text: str, since: int = 0) -> list[Message]:
        """The conversation, from a turn on, with what is said now."""
        system = [Message("system", self.system)] if self.system else []
        said = [message for turn in self.turns[since:] for message in (Message("user", turn.said), Message("assistant", turn.reply))]
        return [*system, *said, Message("user", text)]

    def reply(self, text: str) -> Iterator[str]:
        """Says something, and yields the reply as it is written; what was written is kept, also where it is ended early.

        Raises:
            EmosteerError: for a text that cannot be answered; nothing is then kept.
        """
        felt, options = self._felt(text)
        conversation = [message._asdict() for message in self.messages(text)]
        pieces: list[str] = []
        stream = self.model.stream(conversation, **options)
        try:
            for piece in stream:
                pieces.append(piece)
                yield piece
        finally:
            written = "".join(pieces).strip()
            if written:
                self.turns.append(Turn(text.strip(), written, felt))

    def compare(self, text: str) -> list[tuple[str, Reply]]:
        """The reply to a text without steering and under each emotion, at the intensity that is set."""
        emotions: list[str | None] = [None, *self.model.emotions]
        prompts = [[message._asdict() for message in self.messages(text)]] * len(emotions)
        intensity = [None if emotion is None else self.intensity for emotion in emotions]
        options = {**self.options, "intensity": intensity} if self.intensity is not None else dict(self.options)
        replies = self.model.generate(cast(Any, prompts), emotions, **cast(WritingOptions, options))
        return list(zip([emotion or NEUTRAL for emotion in emotions], cast("list[Reply]", replies), strict=True))

    def _felt(self, text: str) -> tuple[str, dict[str, Any]]:
        """What the next reply feels, in words and as options."""
        options: dict[str, Any] = dict(self.options)
        changes = self.feeling != Feeling()
        if not changes or (self.feeling.arc is None and self.feeling.personality is None and self.intensity is None):
            if self.emotion is None:
                return NEUTRAL, options
            given = {} if self.intensity is None else {"intensity": self.intensity}
            return self.label, {**options, "emotion": self.emotion, **given}
        named = () if self.emotion is None or self.intensity is None else (self.emotion,)
        started = self.feeling.starting(named, self.intensity if named else None)[0]
        arc = started.now(self.messages(text, self.felt_since), self.model.emotions, self.read).within
        return arc.label, {**options, "arc": arc}

    # ---- what is felt ------------------------------------------------------------------------------------------------------------

    @property
    def label(self) -> str:
        """What is felt, as it was asked for."""
        if self.feeling.arc is not None:
            what = self.feeling.arc.label
        elif self.emotion is not None:
            what = self.emotion if self.intensity is None else f"{self.emotion}:{self.intensity:g}"
        else:
            what = NEUTRAL
        fades = "" if self.feeling.half_life is None else f", half after {self.feeling.half_life:g} replies"
        mood = "" if self.feeling.personality is None else f", mood of {self.feeling.personality.label}"
        return what + fades + mood

    def _feels(self, emotion: str | None, intensity: float | None, arc: Arc | None) -> None:
        half_life, personality = self.feeling.half_life, self.feeling.personality
        changed = Feeling(arc, half_life, personality)
        if arc is not None and arc.moves and personality is not None:
            raise UsageError("a personality moves what is felt from turn to turn, an arc within a reply; /personality off first")
        self.emotion, self.intensity, self.feeling, self.felt_since = emotion, intensity, changed, len(self.turns)

    def _known(self, arc: Arc) -> Arc:
        for name in arc.emotions:
            if name not in self.model.emotions:
                raise UsageError(f"unknown emotion '{name}'{suggest(name, self.model.emotions)}; known: {', '.join(self.model.emotions)}")
        return arc

    # ---- commands ----------------------------------------------------------------------------------------------------------------

    def command(self, line: str) -> str:
        """Carries out a command that changes or shows the conversation (all but compare, retry and quit, which the terminal knows), and
        says what came of it.

        Raises:
            UsageError: for a command or an argument that makes no sense; nothing is then changed.
        """
        name, _, rest = line.strip().removeprefix("/").partition(" ")
        rest = rest.strip()
        if name not in COMMANDS:
            raise UsageError(f"unknown command '/{name}'{suggest(name, COMMANDS)}; /help shows all")
        if not COMMANDS[name][0] and rest:
            raise UsageError(f"/{name} takes nothing, found '{rest[:60]}'")
        if name not in ("help", "history", "undo", "reset") and not rest:
            raise UsageError(f"expected /{name} {COMMANDS[name][0]}")
        return str(getattr(self, f"_{name}")(rest))

    def _emotion(self, rest: str) -> str:
        *names, last = rest.split()
        intensity: float | None = None
        if names:
            try:
                intensity = check_intensity(float(last), "the intensity", signed=True)
            except ValueError:
                raise UsageError(f"expected /emotion NAME INTENSITY, such as /emotion fear 60, found '{rest[:60]}'") from None
        emotion = " ".join(names or [last]).lower()
        if emotion == NEUTRAL:
            self._feels(None, None, None)
        else:
            self._known(Arc.parse(f"{emotion}:1"))
            self._feels(emotion, intensity, None)
        return f"feels {self.label}"

    def _mix(self, rest: str) -> str:
        arc = self._known(Arc.parse(rest))
        if len(arc.stops) > 1:
            raise UsageError("a mixture has no arrow; use /arc")
        return self._arc(rest)

    def _arc(self, rest: str) -> str:
        arc = self._known(Arc.parse(rest))
        self._feels(None, None, arc)
        weaker = "" if arc.within == arc else f"; that is more than the text bears together, weakened to {arc.within.label}"
        return f"feels {self.label}{weaker}"

    def _fade(self, rest: str) -> str:
        half_life: float | None = None
        if rest != "off":
            try:
                half_life = float(rest)
            except ValueError:
                raise UsageError(f"expected a number of replies, or off, found '{rest[:60]}'") from None
            Feeling.of(half_life=half_life)
        self.feeling = Feeling(self.feeling.arc, half_life, self.feeling.personality)
        self.felt_since = len(self.turns)
        note = "; give the emotion an intensity, so that there is something to fade" if self._bare and half_life is not None else ""
        return f"feels {self.label}{note}"

    @property
    def _bare(self) -> bool:
        return self.emotion is not None and self.intensity is None

    def _personality(self, rest: str) -> str:
        wanted = None if rest == "off" else Feeling.of(personality=rest)
        arc = self.feeling.arc
        if wanted is not None and arc is not None and arc.moves:
            raise UsageError("a personality moves what is felt from turn to turn, an arc within a reply; /emotion neutral first")
        self.feeling = Feeling(arc, self.feeling.half_life, None if wanted is None else wanted.personality)
        self.felt_since = len(self.turns)
        note = f"; give {self.emotion} an intensity, or it is not felt beside a personality" if self._bare and wanted is not None else ""
        return f"feels {self.label}{note}"

    def _undo(self, rest: str) -> str:
        if not self.turns:
            raise UsageError("there is nothing to take back")
        taken = self.turns.pop()
        self.felt_since = min(self.felt_since, len(self.turns))
        return f"taken back: {taken.said}"

    def _reset(self, rest: str) -> str:
        self.turns.clear()
        self.felt_since = 0
        return "a new conversation"

    def _history(self, rest: str) -> str:
        lines = [line for turn in self.turns for line in (f"you: {turn.said}", f"({turn.felt}) {turn.reply}")]
        return "\n".join(lines) or "nothing was said yet"

    def _help(self, rest: str) -> str:
        width = max(len(f"/{name} {COMMANDS[name][0]}") for name in COMMANDS)
        return "\n".join(f"{f'/{name} {arguments}':<{width}}  {what}" for name, (arguments, what) in COMMANDS.items())

    def _save(self, rest: str) -> str:
        from emosteer.base.files import write_text

        path = Path(rest).expanduser()
        if path.exists():
            raise UsageError(f"{path} is there already; name another file")
        if not self.turns:
            raise UsageError("there is nothing to save yet")
        messages = [message._asdict() for message in self.messages("")[:-1]]
        row = {"model": self.model.model.name, "messages": messages, "felt": [turn.felt for turn in self.turns]}
        try:
            write_text(path, json.dumps(row, ensure_ascii=False) + "\n")
        except OSError as error:
            raise EmosteerError(f"{path} cannot be written: {error.strerror or error}") from None
        return f"{len(self.turns)} turns -> {path}"


def completions(line: str, emotions: Sequence[str]) -> list[str]:
    """What the last word of a line may become: commands, emotions, traits."""
    from emosteer.circuits.moods import Personality

    if not line.startswith("/"):
        return []
    name, space, rest = line[1:].partition(" ")
    if not space:
        return [f"/{command}" for command in COMMANDS if command.startswith(name)]
    word = rest.rpartition(" ")[2] if rest else ""
    words: Sequence[str] = ()
    if name == "emotion" and " " not in rest:
        words = [*emotions, NEUTRAL]
    elif name in ("mix", "arc"):
        words = [f"{emotion}:" for emotion in emotions]
    elif name == "personality":
        words = [*(f"{trait}:" for trait in vars(Personality())), NEUTRAL, "off"]
    elif name == "fade":
        words = ["off"]
    return [each for each in words if each.startswith(word)]
