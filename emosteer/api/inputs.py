"""What the functions of the API are given, as what the stages take: a model, an artefact or its file, a judge. No torch at import."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from emosteer.base.errors import UsageError
from emosteer.base.files import sha256_file
from emosteer.circuits.places import Places, find_circuit, own_bank_of, require_circuit, require_directions

if TYPE_CHECKING:
    from emosteer.api.steered_model import SteeredModel
    from emosteer.base.jsonl import KeyedLog
    from emosteer.circuits.circuit import Circuit
    from emosteer.directions.directions import Directions
    from emosteer.judges.jury import Jury
    from emosteer.judges.protocol import EmotionJudge
    from emosteer.models.model import Model
    from emosteer.probing.settings import ProbeSettings

#: A file as people write it.
PathLike = str | os.PathLike[str]


def path_of(file: PathLike | None) -> Path | None:
    """A file's path, None where none is given."""
    return None if file is None else Path(file)


def bank_of(given: PathLike | None, directions: Directions, file: Path | None) -> Path | None:
    """The reply bank to read: the given one, else the model's own replies where the directions were made with them, else None, which is
    the shipped one.

    Args:
        given: a file, or "self" for the model's own replies; file: where the directions lie, if anywhere.

    Raises:
        UsageError: if the model's own replies are wanted, and the directions were made with others.
    """
    own = None if file is None else own_bank_of(directions, file)
    if given is None or str(given) != "self":
        return path_of(given) or own
    if own is None:
        raise UsageError("these directions were not made with the model's own replies; run `emosteer extract --replies self` first")
    return own


def plain_model(model: Model | SteeredModel) -> Model:
    """The model itself, to be measured.

    Raises:
        UsageError: if it is neither, or is being steered by a `with m.steering(...)` block.
    """
    from emosteer.api.steered_model import SteeredModel
    from emosteer.generation.plain_steering import refuse_steered
    from emosteer.models.model import Model

    bare = model.model if isinstance(model, SteeredModel) else model
    if not isinstance(bare, Model):
        raise UsageError(f"expected a model (what emosteer.load or emosteer.Model.load returns), found a {type(model).__name__}")
    refuse_steered(bare)
    return bare


def directions_of(model: Model, given: Directions | PathLike | None, root: Path) -> tuple[Directions, str, Path | None]:
    """(directions, sha256 of their file, the file where there is one). Directions in memory have the hash that saving them gives.

    Raises:
        ArtifactError: if they are not there, or are another model's.
    """
    from emosteer.base.artifacts import require_model
    from emosteer.directions.directions import Directions

    if isinstance(given, Directions):
        require_model(given.provenance, model.sha256, model.name, "these directions")
        return given, saved_sha256(given.save), None
    directions, path = require_directions(model, path_of(given), Places.of(model.name, root))
    return directions, sha256_file(path), path


def circuit_of(model: Model | SteeredModel, given: Circuit | PathLike | None, root: Path) -> tuple[Circuit, str]:
    """(circuit, sha256 of its file): the given one, else the loaded one of a `SteeredModel`, else the model's own in `root`, else the
    shipped one.

    Raises:
        ArtifactError: if there is none, or it is another model's.
    """
    from emosteer.api.steered_model import SteeredModel
    from emosteer.base.artifacts import require_model
    from emosteer.circuits.circuit import Circuit

    bare = plain_model(model)
    wanted = model.circuit if given is None and isinstance(model, SteeredModel) else given
    if isinstance(wanted, Circuit):
        require_model(wanted.provenance, bare.sha256, bare.name, "this circuit")
        return wanted, saved_sha256(wanted.save)
    circuit, path = require_circuit(bare, path_of(wanted), root)
    return circuit, sha256_file(path)


def dialled_with(circuit: Circuit, instruction: str | None, examples: PathLike | None) -> Circuit:
    """The circuit with the instruction and the examples that its dial is to be fitted with; its own where nothing is given.

    Raises:
        DataError: as `scenarios.examples.examples_of`.
    """
    from emosteer.scenarios.examples import examples_of
    from emosteer.scenarios.prompts import instruction_for

    shown = circuit.examples if examples is None else examples_of(path_of(examples), circuit.emotions)
    return replace(circuit, instruction=instruction_for(instruction, circuit.instruction), examples=shown)


def moving_circuit(model: Model, given: PathLike | None, settings: ProbeSettings, root: Path) -> tuple[Circuit, Path] | None:
    """What `probe` moves its readings with, and its file: the given circuit, else the model's own in `root`, else the shipped one, if
    any; None where no text is moved.

    Raises:
        UsageError: if a circuit is given, and no text is moved. ArtifactError: if it is missing or another model's.
    """
    if given is not None and not settings.moved:
        raise UsageError("expected texts to be moved where a circuit is given, found moved 0; leave one of them out")
    found = find_circuit(model, path_of(given), root) if settings.moved else None
    return None if found is None else (found[0].without_examples(), found[1])  # texts are read as they are


def saved_sha256(save: Callable[[Path], None]) -> str:
    """The hash that an artefact's file has: the same content gives the same bytes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "artefact.safetensors"
        save(path)
        return sha256_file(path)


def jury_of(judge: str | EmotionJudge | Sequence[EmotionJudge]) -> Callable[[KeyedLog], Jury]:
    """The jury of a specification ("embedded,public,linear", "hf:ID", "openai:MODEL"), of a judge that `make_judge` made, or of several:
    where it keeps what it says -> jury."""
    from emosteer.judges import jury
    from emosteer.judges.openai import OpenAIJudge

    if isinstance(judge, str):
        return jury.make_jury(judge)
    judges = cast("list[EmotionJudge]", list(judge) if isinstance(judge, (list, tuple)) else [judge])
    return jury.jury_of_judges(judges, frozenset(one.key for one in judges if isinstance(one, OpenAIJudge)))
