"""`describe_heads` as a function. No torch at import."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from emosteer.api.inputs import PathLike, bank_of, circuit_of, directions_of, path_of, plain_model
from emosteer.base.errors import UsageError
from emosteer.circuits.heads.settings import HeadSettings
from emosteer.circuits.places import ARTIFACTS
from emosteer.scenarios.shipped import read_data

if TYPE_CHECKING:
    from emosteer.api.options import HeadOptions
    from emosteer.api.steered_model import SteeredModel
    from emosteer.circuits.circuit import Circuit
    from emosteer.circuits.heads.heads import HeadStudy
    from emosteer.directions.directions import Directions
    from emosteer.models.model import Model


def describe_heads(
    model: Model | SteeredModel,
    circuit: Circuit | PathLike | None = None,
    directions: Directions | PathLike | None = None,
    *,
    scenarios: PathLike | None = None,
    replies: PathLike | None = None,
    artifacts: PathLike = ARTIFACTS,
    **settings: Unpack[HeadOptions],
) -> HeadStudy:
    """Says what the strongest heads of each emotion's circuit do: where they look, what they write, which texts they fire on, and which
    other heads they read directly.

    Args:
        circuit: in memory or as a file; the loaded one of a `SteeredModel`, else the model's own, else the shipped one, by default.
        directions: in memory or as a file; the model's own in `artifacts` by default.
        scenarios: prompts; replies: the bank that is read, the one that directions are made from by default.
        settings: fields of `circuits.heads.settings.HeadSettings`.

    Raises:
        ArtifactError: if circuit or directions are missing, another model's, or of other emotions. UsageError, DataError: if the data or a
            setting makes no sense. ModelError: if the model does not show where its heads look.
    """
    from emosteer.circuits.heads import study as stage

    bare, chosen = plain_model(model), HeadSettings(**settings)
    made, circuit_sha256 = circuit_of(model, circuit, Path(artifacts))
    found, directions_sha256, path = directions_of(bare, directions, Path(artifacts))
    bank = bank_of(replies, found, path)
    data = read_data(path_of(scenarios), bank, emotions=found.emotions)
    if data.bank is None:
        raise UsageError("expected a bank of replies to read, found none; give one with replies")
    parents = {"circuit": circuit_sha256, "directions": directions_sha256}
    return stage.study(bare, made, found, data.groups, data.bank, chosen, data=data.hashes, parents=parents)
