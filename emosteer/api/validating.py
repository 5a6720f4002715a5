"""`validate` as a function. No torch at import."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from emosteer.api.inputs import PathLike, circuit_of, path_of, plain_model
from emosteer.circuits.places import ARTIFACTS
from emosteer.circuits.validation.settings import ValidateSettings
from emosteer.scenarios.shipped import read_data

if TYPE_CHECKING:
    from emosteer.api.options import ValidateOptions
    from emosteer.api.steered_model import SteeredModel
    from emosteer.circuits.circuit import Circuit
    from emosteer.circuits.validation.validation import Validation
    from emosteer.models.model import Model


def validate(
    model: Model | SteeredModel,
    circuit: Circuit | PathLike | None = None,
    *,
    scenarios: PathLike | None = None,
    replies: PathLike | None = None,
    partial: PathLike | None = None,
    artifacts: PathLike = ARTIFACTS,
    **settings: Unpack[ValidateOptions],
) -> Validation:
    """Measures whether a circuit is necessary, sufficient, specific, its emotion's own and stable, against random sets that match it.

    Args:
        circuit: in memory or as a file; the loaded one of a `SteeredModel`, else the model's own, by default.
        scenarios: prompt file; replies: bank, whose replies are read.
        partial: JSON-lines file that finished prompts are kept in, so that the same call goes on.
        settings: fields of `circuits.validation.settings.ValidateSettings`.

    Raises:
        ArtifactError: if there is no circuit. UsageError, DataError: if the data or a setting makes no sense.
    """
    from emosteer.circuits.validation import validate as stage

    bare = plain_model(model)
    lists: dict[str, Any] = {name: tuple(value) if isinstance(value, (list, tuple)) else value for name, value in settings.items()}
    chosen = ValidateSettings(**lists)
    made, sha256 = circuit_of(model, circuit, Path(artifacts))
    data = read_data(path_of(scenarios), path_of(replies))
    return stage.validate(
        bare, made, data.groups, data.bank or {}, chosen, data=data.hashes, parents={"circuit": sha256}, partial=path_of(partial)
    )
