"""Where artefacts are, and how to get from a model's name to its circuit: find it, or make it. No torch at import."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from emosteer.errors import ArtifactError, DataError
from emosteer.files import sha256_file, slug
from emosteer.progress import note
from emosteer.scenarios import EMOTIONS, Bank, Group, data_path, groups_of, read_bank, read_scenarios, split, spread

if TYPE_CHECKING:
    from emosteer.artifacts import Identified
    from emosteer.circuit import Circuit
    from emosteer.directions import Directions
    from emosteer.model import Model

#: Where artefacts go unless told otherwise.
ARTIFACTS = Path("artifacts")


@dataclass(frozen=True)
class Places:
    """The artefact files of one model."""

    folder: Path

    @classmethod
    def of(cls, model_name: str, root: Path = ARTIFACTS) -> Places:
        """`artifacts/<model>/`."""
        return cls(root / slug(model_name))

    @property
    def directions(self) -> Path:
        """What `extract` writes."""
        return self.folder / "directions.safetensors"

    @property
    def scores(self) -> Path:
        """What `ablate` writes."""
        return self.folder / "scores.safetensors"

    @property
    def circuit(self) -> Path:
        """What `circuit` writes."""
        return self.folder / "circuit.safetensors"


@dataclass(frozen=True)
class Data:
    """What a stage reads: the scenario-events, the bank where one is used, and the files' hashes."""

    groups: list[Group]
    bank: Bank | None
    hashes: dict[str, str]


def read_data(scenarios: Path | None, replies: Path | None, elicitation: str = "reply", limit: int | None = None) -> Data:
    """Reads scenarios and, for the `reply` elicitation, a bank; the shipped training files by default.

    Raises:
        DataError: for whatever is wrong with them.
    """
    scenario_file = scenarios or data_path("sev/train.jsonl")
    groups = groups_of(read_scenarios(scenario_file))
    hashes = {scenario_file.name: sha256_file(scenario_file)}
    bank = None
    if elicitation == "reply":
        bank_file = replies or data_path("replies/train.jsonl")
        bank = read_bank(bank_file)
        hashes[f"replies/{bank_file.name}"] = sha256_file(bank_file)
        groups = [group for group in groups if group.key in bank]
        if not groups:
            raise DataError(
                f"no scenario-event of {scenario_file} has a reply in {bank_file}; give the bank of these scenarios with --replies"
            )
    if limit is not None and limit < len(groups):
        groups = spread(groups, limit)
    return Data(groups, bank, hashes)


def without_development(groups: list[Group], scenarios: Path | None = None) -> list[Group]:
    """The groups outside the development split (a fifth of the scenarios), on which `calibrate` and `evaluate` choose."""
    kept_back = {scenario.id for scenario in split(read_scenarios(scenarios or data_path("sev/train.jsonl")), 0.2, 0)[1]}
    return [group for group in groups if group.key.scenario not in kept_back]


def packaged_circuit(model_name: str) -> Path | None:
    """The circuit shipped for a model, if there is one."""
    path = Path(__file__).parent / "assets" / f"{slug(model_name)}.circuit.safetensors"
    return path if path.exists() else None


def find_circuit(model: Identified, given: Path | None, root: Path = ARTIFACTS) -> tuple[Circuit, Path] | None:
    """The circuit to steer with: the given file, else the model's own in `artifacts/`, else the shipped one.

    Raises:
        ArtifactError: if a file is there but cannot be used with this model.
    """
    from emosteer.circuit import Circuit

    if given is not None:
        return Circuit.load(given, model), given
    for path in (Places.of(model.name, root).circuit, packaged_circuit(model.name)):
        if path is not None and path.exists():
            return Circuit.load(path, model), path
    return None


def require_circuit(model: Identified, given: Path | None, root: Path = ARTIFACTS) -> tuple[Circuit, Path]:
    """As `find_circuit`, with the commands that make a circuit where there is none.

    Raises:
        ArtifactError: if there is no circuit.
    """
    found = find_circuit(model, given, root)
    if found is None:
        name = shlex.quote(model.reference)
        raise ArtifactError(
            f"there is no circuit for {model.name} yet; make it with `emosteer extract --model {name}` and "
            f"`emosteer circuit --model {name}`, or add --auto to have it made now"
        )
    return found


def require_dial(model: Identified, found: tuple[Circuit, Path], given: Path | None) -> None:
    """Refuses an intensity where the circuit has no dial.

    Raises:
        ArtifactError: with the command that calibrates it.
    """
    if not found[0].calibrated:
        command = f"emosteer calibrate --model {shlex.quote(model.reference)}"
        command += f" --circuit {shlex.quote(str(given))}" if given is not None else ""
        raise ArtifactError(f"the circuit {found[1]} is not calibrated; run `{command}` first, or use --strength")


def ensure_directions(model: Model, places: Places, data: Data) -> Directions:
    """The model's directions with default settings: read where they are there already, else extracted and written."""
    from emosteer.extract import Settings, extract, finish_checkpoint

    found = usable_directions(model, places.directions)
    if found is not None:
        return found
    note(f"extracting emotion directions from {len(data.groups)} scenario-events -> {places.directions}")
    checkpoint = places.directions.with_name(places.directions.name + ".partial")
    made = extract(model, data.groups, Settings(EMOTIONS), bank=data.bank, data=data.hashes, checkpoint=checkpoint)
    made.save(places.directions)
    finish_checkpoint(checkpoint)
    return made


def make_circuit(model: Model, root: Path = ARTIFACTS) -> tuple[Circuit, Path]:
    """From nothing to a circuit with the shipped data and default settings: what `generate --auto` does."""
    from emosteer.assembly import CircuitSettings, assemble
    from emosteer.gains import GainSettings
    from emosteer.tuning import TuneSettings, tune_strength

    places, data = Places.of(model.name, root), read_data(None, None)
    directions = ensure_directions(model, places, data)
    note("assembling the circuits and tuning their strength")
    parents = {"directions": sha256_file(places.directions)}
    circuit = assemble(
        model,
        directions,
        without_development(data.groups),
        CircuitSettings(),
        data=data.hashes,
        parents=parents,
        bank=data.bank,
        gain_settings=GainSettings(),
    )
    circuit = tune_strength(model, circuit, data.groups, TuneSettings())
    circuit.save(places.circuit)
    note(f"circuit -> {places.circuit}")
    return circuit, places.circuit


def usable_directions(model: Model, path: Path) -> Directions | None:
    """The directions at a path if they are whole and this model's, else None."""
    from emosteer.directions import Directions

    if not path.exists():
        return None
    try:
        found = Directions.load(path)
    except ArtifactError as error:
        note(f"extracting again: {error}")
        return None
    return found if found.provenance.model_sha256 == model.sha256 else None
