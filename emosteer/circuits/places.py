"""Where a model's artefacts lie, and which circuit and directions a command takes."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from emosteer.base.errors import ArtifactError
from emosteer.base.files import slug

if TYPE_CHECKING:
    from emosteer.base.artifacts import Identified
    from emosteer.circuits.circuit import Circuit
    from emosteer.directions.directions import Directions
    from emosteer.models.model import Model


def require_directions(model: Model, given: Path | None, places: Places) -> tuple[Directions, Path]:
    """The directions to work from.

    Raises:
        ArtifactError: with the command that makes them, if they are not there, or if they are another model's.
    """
    from emosteer.base import artifacts
    from emosteer.directions.directions import Directions

    path = given or places.directions
    if given is None and not path.exists():
        raise ArtifactError(
            f"there are no directions for {model.name} at {path}; run `emosteer extract --model {shlex.quote(model.reference)}` first"
        )
    found = Directions.load(path)
    artifacts.require_model(found.provenance, model.sha256, model.name, path)
    found.require_sizes(model.shape, model.name, path)
    return found, path


#: The model that is taken unless told otherwise: the one whose circuit is shipped.
DEFAULT_MODEL = "smollm2-135m"
#: Where artefacts go unless told otherwise.
ARTIFACTS = Path("artifacts")
#: The model's own replies that passed the filter, beside the directions that `extract --replies self` made with them.
OWN_BANK = "own-bank.jsonl"


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

    @property
    def probes(self) -> Path:
        """What `probe` writes."""
        return self.folder / "probes.safetensors"

    @property
    def heads(self) -> Path:
        """What `heads` writes."""
        return self.folder / "heads.safetensors"

    @property
    def heads_graph(self) -> Path:
        """The graph of it, for other tools."""
        return self.folder / "heads-graph.json"

    @property
    def effects(self) -> Path:
        """What `effects` writes."""
        return self.folder / "effects.safetensors"

    @property
    def validation(self) -> Path:
        """What `validate` writes."""
        return self.folder / "validation.safetensors"


def own_bank_of(directions: Directions, path: Path) -> Path | None:
    """The bank of the model's own replies, beside the directions that were made with it; None for directions made with another."""
    own = path.with_name(OWN_BANK)
    return own if f"replies/{own.name}" in directions.provenance.data else None


def packaged_circuit(model_name: str) -> Path | None:
    """The circuit shipped for a model, if there is one."""
    path = Path(__file__).parents[1] / "assets" / f"{slug(model_name)}.circuit.safetensors"
    return path if path.exists() else None


def packaged_effects(model_name: str) -> Path | None:
    """The effects of the circuit shipped for a model, if they are shipped."""
    path = Path(__file__).parents[1] / "assets" / f"{slug(model_name)}.effects.safetensors"
    return path if path.exists() else None


def find_circuit(model: Identified, given: Path | None, root: Path = ARTIFACTS) -> tuple[Circuit, Path] | None:
    """The circuit to steer with: the given file, else the model's own in `artifacts/`, else the shipped one.

    Raises:
        ArtifactError: if a file is there but cannot be used with this model.
    """
    from emosteer.circuits.circuit import Circuit

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
