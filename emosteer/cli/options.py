"""Options that several commands share. No torch here."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from emosteer.base.errors import UsageError
from emosteer.circuits.dial import check_intensity
from emosteer.circuits.places import DEFAULT_MODEL as DEFAULT_MODEL
from emosteer.generation.decoding import DRAWN_TEMPERATURE, MAX_CANDIDATES
from emosteer.judges.registry import JUDGE_FORMS
from emosteer.scenarios.emotions import EMOTIONS
from emosteer.scenarios.prompt_sets import KINDS


def complete_model(begun: str) -> list[str]:
    """Models at hand whose names begin so, for the shell."""
    from emosteer.models.weights.resolve import known

    return [model.name for model in known() if model.name.startswith(begun)]


def complete_emotion(begun: str) -> list[str]:
    """The six emotions and all of them together; of several with commas, the last."""
    before, comma, last = begun.rpartition(",")
    return [f"{before}{comma}{name}" for name in (*EMOTIONS, "all") if name.startswith(last)]


ModelOption = Annotated[
    str,
    typer.Option("--model", "-m", help="Packaged name, hub id, local folder or GGUF file.", metavar="REF", autocompletion=complete_model),
]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
DeviceMapOption = Annotated[
    str | None,
    typer.Option(
        "--device-map", help="Lay a large model over all GPUs: auto, balanced or sequential; needs accelerate.", show_default=False
    ),
]
DtypeOption = Annotated[
    str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16; int8 or nf4 hold weights in 8 or 4 bits (bitsandbytes).")
]
SeedOption = Annotated[int, typer.Option("--seed", help="Everything random follows from it.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on stdout instead of tables.")]
RootOption = Annotated[Path, typer.Option("--artifacts", help="Folder that artefacts are kept in.", metavar="DIR")]
ScenariosOption = Annotated[
    Path | None, typer.Option("--scenarios", help="SEV file; the shipped training set if not given.", metavar="FILE")
]
RepliesOption = Annotated[
    str | None, typer.Option("--replies", help="Reply bank, or 'self' for the model's own filtered replies.", metavar="FILE|self")
]
PanelOption = Annotated[
    str,
    typer.Option("--judge", help=f"A judge, or a panel of several with commas, whose mean decides: {JUDGE_FORMS}.", metavar="SPEC,..."),
]
KindsOption = Annotated[
    str, typer.Option("--kinds", help=f"Kinds of prompt: all, or some of {', '.join(KINDS)}; -KIND leaves one out.", metavar="A,B,...")
]
GuidanceOption = Annotated[
    float,
    typer.Option(max=100, help="How far replies lean towards the prompt, away from what would be said to nothing; 1 is none, and faster."),
]
PenalisePromptOption = Annotated[
    bool,
    typer.Option(
        "--penalise-prompt", help="The repetition penalty is on the prompt's tokens, too, as Hugging Face and vLLM have it; answers fewer."
    ),
]
BestOfOption = Annotated[
    int,
    typer.Option(
        "--best-of",
        max=MAX_CANDIDATES,
        help=f"Candidates that each reply is chosen from, drawn at temperature {DRAWN_TEMPERATURE:g} unless told otherwise, each as it is "
        "or ended after one of its sentences; 1 is none, and faster.",
        metavar="N",
    ),
]
NoExamplesOption = Annotated[
    bool, typer.Option("--no-examples", help="Leave out the circuit's examples, exchanges in the emotion that stand before the prompt.")
]
ExamplesOption = Annotated[
    str | None,
    typer.Option(
        "--examples",
        help='Exchanges that stand before every prompt that is steered, a line each: {"prompt": ..., "replies": {EMOTION: ...}}, or none; '
        "kept with the circuit.",
        metavar="FILE.jsonl|none",
        show_default=False,
    ),
]
#: How a set of emotions is named, for the help of options.
SETS = "a set: ekman6, plutchik8, goemotions27, parrott:primary, parrott:secondary or parrott:tertiary"
LimitOption = Annotated[int | None, typer.Option("--limit", min=1, max=1_000_000, help="Use this many scenario-events, evenly spread.")]


def listed(values: Iterable[float | str]) -> str:
    """Several values as one option takes them: with commas, numbers as short as can be."""
    return ",".join(value if isinstance(value, str) else f"{value:g}" for value in values)


Number = TypeVar("Number", int, float)


def words(text: str) -> tuple[str, ...]:
    """The names in an option that takes several, with commas."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def numbers(text: str, name: str, kind: type[Number]) -> tuple[Number, ...]:
    """The same of numbers. name: the option's.

    Raises:
        UsageError: if one of them is none.
    """
    try:
        return tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise UsageError(f"expected {name} to be {'whole ' if kind is int else ''}numbers with commas, found '{text[:60]}'") from error


def one_of(intensity: float | None, strength: float | None) -> None:
    """Checks how much was asked for: an intensity from -100 (less of the emotion) to 100, or a strength, or neither.

    Raises:
        UsageError: for both, or an intensity outside the dial.
    """
    if intensity is None:
        return
    if strength is not None:
        raise UsageError("expected --intensity or --strength, found both")
    check_intensity(intensity, signed=True)


OutOption = Annotated[Path | None, typer.Option("--out", "-o", help="Where to write; artifacts/MODEL/ if not given.", metavar="FILE")]


DirectionsOption = Annotated[
    Path | None, typer.Option("--directions", help="What `extract` wrote; artifacts/MODEL/ if not given.", metavar="FILE")
]
