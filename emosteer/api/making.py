"""How to get from a model to its directions and its circuit: find them, or make them. No torch at import."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from emosteer.base.errors import ArtifactError
from emosteer.base.progress import note
from emosteer.circuits.places import ARTIFACTS, Places, find_circuit
from emosteer.scenarios.scenarios import EMOTIONS
from emosteer.scenarios.shipped import Data, read_data

if TYPE_CHECKING:
    from emosteer.api.costs.cost import Cost
    from emosteer.base.artifacts import Identified
    from emosteer.circuits.circuit import Circuit
    from emosteer.directions.directions import Directions
    from emosteer.models.model import Model


def ensure_circuit(model: Identified, given: Path | None, root: Path, loaded: Callable[[], Model]) -> tuple[Circuit, Path]:
    """The circuit to steer with, made first where there is none: what `generate --auto` and `load(..., auto=True)` do.

    Args:
        loaded: gives the model itself, which only the making needs.
    """
    ready = find_circuit(model, given, root)
    return make_circuit(loaded(), root) if ready is None else ready


def make_circuit(model: Model, root: Path = ARTIFACTS) -> tuple[Circuit, Path]:
    """From nothing to a circuit with the shipped data and default settings."""
    from emosteer.api.costs.cost import spoken
    from emosteer.api.estimates import first_reply
    from emosteer.api.stages import assemble

    places, data = Places.of(model.name, root), read_data(None, None)
    ready = usable_directions(model, places.directions)
    costs = first_reply(model, data, EMOTIONS, checkpoint_of(places), ready is not None)
    times = [cost.seconds for cost in costs]
    if not any(time is None for time in times):
        note(f"{model.name} is new here: about {spoken(sum(time or 0.0 for time in times))} until the first reply, once")
    for cost in costs:
        note(cost.line)
    if ready is None:
        ensure_directions(model, places, data)
    note("assembling the circuits and tuning their strength")
    circuit = assemble(model, places.directions)
    circuit.save(places.circuit)
    note(f"circuit -> {places.circuit}")
    return circuit, places.circuit


def cost_of_making(model: Model, root: Path = ARTIFACTS) -> Cost:
    """What `make_circuit` would do, as the cost of `generate --auto`."""
    from emosteer.api.costs.cost import Cost
    from emosteer.api.estimates import first_reply

    places = Places.of(model.name, root)
    ready = usable_directions(model, places.directions)
    return Cost.together("generate --auto", first_reply(model, read_data(None, None), EMOTIONS, checkpoint_of(places), ready is not None))


def ensure_directions(model: Model, places: Places, data: Data) -> Directions:
    """The model's directions with default settings: read where they are there already, else extracted and written."""
    from emosteer.directions.extract import extract, finish_checkpoint
    from emosteer.directions.settings import Settings

    ready = usable_directions(model, places.directions)
    if ready is not None:
        return ready
    note(f"extracting emotion directions from {len(data.groups)} scenario-events -> {places.directions}")
    checkpoint = checkpoint_of(places)
    made = extract(model, data.groups, Settings(EMOTIONS), bank=data.bank, data=data.hashes, checkpoint=checkpoint)
    made.save(places.directions)
    finish_checkpoint(checkpoint)
    return made


def checkpoint_of(places: Places) -> Path:
    """Where an extraction keeps its progress."""
    return places.directions.with_name(places.directions.name + ".partial")


def usable_directions(model: Model, path: Path) -> Directions | None:
    """The directions at a path if they are whole and this model's, else None."""
    from emosteer.directions.directions import Directions

    if not path.exists():
        return None
    try:
        ready = Directions.load(path)
    except ArtifactError as error:
        note(f"extracting again: {error}")
        return None
    return ready if ready.provenance.model_sha256 == model.sha256 else None
