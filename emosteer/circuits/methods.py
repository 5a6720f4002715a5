"""One table of every way of writing: what `generate`, the contest, vLLM and the report know of a method stands in its row.

A further contender of the contest is a row here and the function that makes its vectors (`BUILDERS` of `evaluation.controls`) or, for a
prompt, its messages (`elicit` of `scenarios.prompts`). No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

CIRCUIT, RESIDUAL, LEARNED_RESIDUAL, PROMPT, NONE = "circuit", "residual", "learned-residual", "prompt", "none"


class Kind(Enum):
    """How a method gets its emotion into the reply, if at all."""

    UNSTEERED = "unsteered"
    PROMPT = "prompt"
    STEERED = "steered"
    CONTROL = "control"


class Part(Enum):
    """A part of a circuit that vectors and default strengths come from: its heads and neurons, the directions and layers of residual
    steering, or the vectors that were learned for these layers."""

    UNITS = "units"
    STREAM = "residual stream"
    LEARNED_STREAM = "learned residual vectors"


@dataclass(frozen=True)
class Look:
    """How a method is drawn. paint: a CSS variable of the report; shape: of its points; dash: of its lines."""

    paint: str
    shape: str
    dash: tuple[int, ...] = (1, 0)


@dataclass(frozen=True)
class Method:
    """One way of writing.

    label: its name for people; phrase: the same inside a sentence; singular: whether the report says of it that it "does" something;
    elicitation: how a prompt asks (`scenarios.prompts`); vectors: the part of the circuit that its vectors are made from; built: whether
    `evaluation.controls` makes them from that part, else they are added as they are; needs_directions: whether it takes the directions
    file for that, beside the circuit; strength: the part whose default strengths it has; controls: the method that it is a control of,
    whose strengths it takes; dial: whether `calibrate` fits an intensity dial for it; shows: whether the circuit's examples stand
    before its prompt although it does not steer (they do before every prompt that is steered); turn: its place in the contest, where
    rows of one turn follow each other as here, None where it does not take part; generate, vllm: whether `generate` offers it, and with
    vLLM.
    """

    name: str
    label: str
    phrase: str
    look: Look
    kind: Kind
    elicitation: str | None = None
    vectors: Part | None = None
    built: bool = False
    needs_directions: bool = False
    strength: Part | None = None
    controls: str | None = None
    dial: bool = False
    shows: bool = False
    turn: int | None = None
    generate: bool = False
    vllm: bool = False
    singular: bool = False

    @property
    def steers(self) -> bool:
        """Whether it adds vectors, at some strength."""
        return self.vectors is not None

    @property
    def asks(self) -> bool:
        """Whether its prompt asks for the emotion."""
        return self.kind is Kind.PROMPT


def _prompt(elicitation: str, look: Look, turn: int) -> Method:
    name, label, phrase = f"prompt-{elicitation}", f"Prompt: {elicitation}", f"the {elicitation} prompt"
    return Method(name, label, phrase, look, Kind.PROMPT, elicitation=elicitation, turn=turn)


def _control(name: str, look: Look, part: Part, controls: str, turn: int, *, directions: bool = False, singular: bool = False) -> Method:
    words = name.replace("-", " ")
    return Method(
        *(name, words.capitalize(), words, look, Kind.CONTROL),
        vectors=part,
        built=True,
        needs_directions=directions,
        strength=part,
        controls=controls,
        turn=turn,
        singular=singular,
    )


_ROWS = (
    Method(
        *(CIRCUIT, "Circuit", "the circuit", Look("m-circuit", "circle"), Kind.STEERED),
        vectors=Part.UNITS,
        strength=Part.UNITS,
        dial=True,
        turn=6,
        generate=True,
        vllm=True,
    ),
    Method(
        *(RESIDUAL, "Residual steering", "residual steering", Look("m-residual", "square", (7, 3)), Kind.STEERED),
        vectors=Part.STREAM,
        strength=Part.STREAM,
        turn=4,
        generate=True,
    ),
    Method(
        *(
            LEARNED_RESIDUAL,
            "Learned residual",
            "learned residual steering",
            Look("m-learned", "triangle-right", (6, 2, 2, 2)),
            Kind.STEERED,
        ),
        vectors=Part.LEARNED_STREAM,
        strength=Part.LEARNED_STREAM,
        turn=5,
        generate=True,
    ),
    Method(
        *(PROMPT, "Prompt", "the prompt", Look("m-tone", "triangle-up", (4, 1)), Kind.PROMPT),
        elicitation="tone",
        generate=True,
        vllm=True,
    ),
    _prompt("tone", Look("m-tone", "triangle-up", (2, 2)), turn=2),
    _prompt("system", Look("m-system", "triangle-down", (5, 2, 1, 2)), turn=1),
    _prompt("stimulus", Look("m-stimulus", "diamond", (1, 3)), turn=3),
    Method(
        *("prompt-examples", "Prompt: examples", "the examples prompt", Look("m-tone", "diamond", (6, 3)), Kind.PROMPT),
        elicitation="reply",
        shows=True,
        turn=3,
    ),
    Method(NONE, "Unsteered", "no steering", Look("m-none", "cross"), Kind.UNSTEERED, turn=0, generate=True, vllm=True),
    _control("random-heads", Look("m-control", "circle", (4, 4)), Part.UNITS, CIRCUIT, turn=7, directions=True),
    _control("random-circuit", Look("m-control", "square", (2, 4)), Part.UNITS, CIRCUIT, turn=8),
    _control("random-direction", Look("m-control", "diamond", (1, 4)), Part.STREAM, RESIDUAL, turn=9, singular=True),
)


def _contest() -> tuple[str, ...]:
    turns = [(row.turn, row.name) for row in _ROWS if row.turn is not None]
    return tuple(name for _, name in sorted(turns, key=lambda pair: pair[0]))


#: Name -> row, in the order of the report's tables and plots.
METHODS = {row.name: row for row in _ROWS}
#: Names: of the contest, in the order in which it writes; of its prompts and its controls; of everything steered but the controls.
CONTEST = _contest()
PROMPTS = tuple(name for name in CONTEST if METHODS[name].asks)
CONTROLS = tuple(name for name in CONTEST if METHODS[name].kind is Kind.CONTROL)
STEERED = tuple(name for name, row in METHODS.items() if row.kind is Kind.STEERED)
#: Names: of what `generate` offers, and what of it vLLM can write.
GENERATE = tuple(name for name, row in METHODS.items() if row.generate)
VLLM = tuple(name for name, row in METHODS.items() if row.vllm)


def source_of(name: str) -> str:
    """The method whose strengths a method is given: for a control what it controls, else itself."""
    return METHODS[name].controls or name
