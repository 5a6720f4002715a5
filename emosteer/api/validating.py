"""`validate` as a function. No torch at import."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from emosteer.api.inputs import PathLike, circuit_of, jury_of, path_of, plain_model
from emosteer.circuits.places import ARTIFACTS
from emosteer.circuits.validation.settings import ValidateSettings
from emosteer.judges.registry import PANEL
from emosteer.scenarios.shipped import read_data

if TYPE_CHECKING:
    from emosteer.api.options import ValidateOptions
    from emosteer.api.steered_model import SteeredModel
    from emosteer.circuits.circuit import Circuit
    from emosteer.circuits.validation.validation import Validation
    from emosteer.judges.protocol import EmotionJudge
    from emosteer.models.model import Model


def validate(
    model: Model | SteeredModel,
    circuit: Circuit | PathLike | None = None,
    *,
    scenarios: PathLike | None = None,
    replies: PathLike | None = None,
    judge: str | EmotionJudge | Sequence[EmotionJudge] = PANEL,
    partial: PathLike | None = None,
    artifacts: PathLike = ARTIFACTS,
    **settings: Unpack[ValidateOptions],
) -> Validation:
    """Measures whether a circuit is necessary, sufficient, specific, its emotion's own and stable, against random sets that match it.

    Args:
        circuit: in memory or as a file; the loaded one of a `SteeredModel`, else the model's own, by default.
        scenarios: prompt file; replies: bank, whose replies are read.
        judge: who reads the replies that are written under ablation, where `written` asks for some (as for `calibrate`).
        partial: JSON-lines file that finished prompts are kept in, so that the same call goes on; replies and opinions in one beside it.
        settings: fields of `circuits.validation.settings.ValidateSettings`.

    Raises:
        ArtifactError: if there is no circuit. UsageError, DataError: if the data or a setting makes no sense.
    """
    from emosteer.base.jsonl import KeyedLog
    from emosteer.circuits.validation import validate as stage
    from emosteer.judges.huggingface import refuse_same_weights

    bare = plain_model(model)
    lists: dict[str, Any] = {name: tuple(value) if isinstance(value, (list, tuple)) else value for name, value in settings.items()}
    chosen = ValidateSettings(**lists)
    made, sha256 = circuit_of(model, circuit, Path(artifacts))
    data = read_data(path_of(scenarios), path_of(replies), emotions=made.emotions)
    file, told = path_of(partial), {"data": data.hashes, "parents": {"circuit": sha256}}
    with contextlib.ExitStack() as stack:
        jury = None
        if chosen.written:
            beside = written_beside(file) if file else Path(stack.enter_context(tempfile.TemporaryDirectory())) / "written.jsonl"
            jury = jury_of(judge)(KeyedLog(beside))
            refuse_same_weights(jury.judges, bare.sha256)
        return stage.validate(bare, made, data.groups, data.bank or {}, chosen, **told, partial=file, jury=jury)


def kept_beside(partial: Path) -> list[Path]:
    """All files that progress is kept in."""
    return [partial, partial.with_name(partial.name + ".prepared"), written_beside(partial)]


def written_beside(partial: Path) -> Path:
    """Where replies and opinions are kept, beside the finished prompts."""
    return partial.with_name(partial.name.removesuffix(".jsonl") + ".written.jsonl")
