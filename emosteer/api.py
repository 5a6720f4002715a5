"""Where artefacts are, and how to get from a model's name to its circuit: find it, or make it. No torch at import."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from emosteer.base.errors import ArtifactError
from emosteer.base.files import sha256_file
from emosteer.base.progress import note
from emosteer.circuits.places import ARTIFACTS, Places
from emosteer.scenarios.scenarios import EMOTIONS
from emosteer.scenarios.shipped import Data, read_data, without_development

if TYPE_CHECKING:
    from emosteer.circuits.circuit import Circuit
    from emosteer.directions.directions import Directions
    from emosteer.models.model import Model


def ensure_directions(model: Model, places: Places, data: Data) -> Directions:
    """The model's directions with default settings: read where they are there already, else extracted and written."""
    from emosteer.directions.extract import extract, finish_checkpoint
    from emosteer.directions.settings import Settings

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
    from emosteer.calibration.default_strength import tune_strength
    from emosteer.calibration.settings import TuneSettings
    from emosteer.circuits.assemble import assemble
    from emosteer.circuits.settings import CircuitSettings, GainSettings

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
    from emosteer.directions.directions import Directions

    if not path.exists():
        return None
    try:
        found = Directions.load(path)
    except ArtifactError as error:
        note(f"extracting again: {error}")
        return None
    return found if found.provenance.model_sha256 == model.sha256 else None
