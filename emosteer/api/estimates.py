"""What a stage will cost, from what its command is given: the data read and the settings filled in as the stage itself does. No torch at
import."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emosteer.api.costs.cost import Cost
from emosteer.api.inputs import PathLike, bank_of, circuit_of, directions_of, moving_circuit, path_of
from emosteer.api.stages import assembly_of
from emosteer.attribution.settings import AblateSettings
from emosteer.circuits.heads.settings import HeadSettings
from emosteer.circuits.settings import CircuitSettings, GainSettings
from emosteer.circuits.validation.settings import ValidateSettings
from emosteer.probing.settings import ProbeSettings
from emosteer.probing.texts import texts_of
from emosteer.scenarios.shipped import Data, read_data, without_development
from emosteer.side_effects.battery import battery_of
from emosteer.side_effects.settings import EffectsSettings

if TYPE_CHECKING:
    from emosteer.circuits.circuit import Circuit
    from emosteer.directions.directions import Directions
    from emosteer.models.model import Model


def ablate(
    model: Model,
    directions: Directions | PathLike | None,
    *,
    settings: AblateSettings,
    scenarios: PathLike | None = None,
    replies: PathLike | None = None,
    partial: PathLike | None = None,
    artifacts: PathLike,
) -> Cost:
    """Of `api.stages.ablate` with the same arguments; raises what it raises of its data."""
    from emosteer.api.costs.stages import of_ablate

    made, _, path = directions_of(model, directions, Path(artifacts))
    bank = bank_of(replies, made, path)
    data = read_data(path_of(scenarios), bank, made.elicitation, emotions=made.emotions)
    return of_ablate(model, made, data.groups, settings, data.bank, path_of(partial))


def assemble(model: Model, directions: Directions | PathLike | None, **given: Any) -> Cost:
    """Of `api.stages.assemble` with the same arguments; raises what it raises of its data."""
    from emosteer.api.costs.stages import of_circuit

    work = assembly_of(model, directions, **given)
    made = work.directions
    return of_circuit(
        model, made.emotions, made.instruction, work.groups, work.data.bank, work.settings, work.gains, work.residual, work.tunes
    )


def probe(
    model: Model,
    texts: PathLike | None,
    *,
    circuit: PathLike | None,
    scenarios: PathLike | None,
    replies: PathLike | None,
    artifacts: PathLike,
    **settings: Any,
) -> Cost:
    """Of `api.probing.probe` with the same arguments; raises what it raises of its data."""
    from emosteer.api.costs.stages import of_probe

    chosen = ProbeSettings(**settings)
    data = texts_of(path_of(texts), path_of(scenarios), path_of(replies), chosen)
    moving_circuit(model, circuit, chosen, Path(artifacts))
    return of_probe(model, data, chosen)


def first_reply(model: Model, data: Data, emotions: Sequence[str], checkpoint: Path, extracted: bool) -> tuple[Cost, ...]:
    """Of everything that `--auto` does before the first reply of a new model. extracted: whether the directions are there already."""
    from emosteer.api.costs.stages import of_circuit, of_extract
    from emosteer.directions.settings import Settings

    settings = Settings(tuple(emotions))
    first = () if extracted else (of_extract(model, data.groups, settings, data.bank, checkpoint),)
    groups = without_development(data.groups, None)
    return (*first, of_circuit(model, emotions, settings.instruction, groups, data.bank, CircuitSettings(), GainSettings(), True, True))


def heads(
    model: Model,
    circuit: Circuit | PathLike | None,
    directions: Directions | PathLike | None,
    *,
    scenarios: PathLike | None,
    replies: PathLike | None,
    artifacts: PathLike,
    **settings: Any,
) -> Cost:
    """Of `api.describing.describe_heads` with the same arguments; raises what it raises of its data."""
    from emosteer.api.costs.studies import of_heads

    made, _ = circuit_of(model, circuit, Path(artifacts))
    found, _, path = directions_of(model, directions, Path(artifacts))
    data = read_data(path_of(scenarios), bank_of(replies, found, path), emotions=found.emotions)
    return of_heads(model, made, found, data.groups, data.bank or {}, HeadSettings(**settings))


def validate(
    model: Model,
    circuit: Circuit | PathLike | None,
    *,
    scenarios: PathLike | None,
    replies: PathLike | None,
    partial: Path,
    artifacts: PathLike,
    **settings: Any,
) -> Cost:
    """Of `api.validating.validate` with the same arguments; raises what it raises of its data."""
    from emosteer.api.costs.studies import of_validate
    from emosteer.base.jsonl import whole_rows

    made, _ = circuit_of(model, circuit, Path(artifacts))
    data = read_data(path_of(scenarios), path_of(replies), emotions=made.emotions)
    kept = len(whole_rows(partial)) if partial.is_file() else 0
    return of_validate(model, made, data.groups, data.bank or {}, ValidateSettings(**settings), kept)


def effects(
    model: Model,
    circuit: Circuit | PathLike | None,
    *,
    questions: PathLike | None,
    quick: bool,
    batch_size: int,
    partial: Path,
    fresh: bool,
    artifacts: PathLike,
    **settings: Any,
) -> Cost:
    """Of `api.effects.effects` with the same arguments; raises what it raises of its data."""
    from emosteer.api.costs.replies import of_effects

    chosen = EffectsSettings.quick(**settings) if quick else EffectsSettings(**settings)
    ready, _ = circuit_of(model, circuit, Path(artifacts))
    return of_effects(
        model, ready.without_examples(), battery_of(chosen, path_of(questions)), chosen, batch_size, None if fresh else partial
    )
