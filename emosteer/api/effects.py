"""`effects` as a function. No torch at import."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from emosteer.api.inputs import PathLike, circuit_of, path_of, plain_model
from emosteer.base.errors import DataError
from emosteer.circuits.places import ARTIFACTS, Places, packaged_effects
from emosteer.judges.registry import EMBEDDED, KEY_ENV
from emosteer.side_effects.battery import battery_of
from emosteer.side_effects.limits import find_rows, warnings_for
from emosteer.side_effects.settings import EffectsSettings, Limits
from emosteer.writing.settings import BATCH_SIZE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from emosteer.api.options import EffectsOptions
    from emosteer.api.steered_model import SteeredModel
    from emosteer.circuits.circuit import Circuit
    from emosteer.judges.protocol import EmotionJudge
    from emosteer.models.model import Model
    from emosteer.side_effects.outcomes import Reader
    from emosteer.side_effects.side_effects import SideEffects


def effects(
    model: Model | SteeredModel,
    circuit: Circuit | PathLike | None = None,
    *,
    questions: PathLike | None = None,
    judge: str = EMBEDDED,
    base_url: str | None = None,
    key_env: str = KEY_ENV,
    limits: str | None = None,
    quick: bool = False,
    partial: PathLike | None = None,
    batch_size: int = BATCH_SIZE,
    fresh: bool = False,
    artifacts: PathLike = ARTIFACTS,
    **settings: Unpack[EffectsOptions],
) -> SideEffects:
    """Measures what a circuit along its dial, residual steering, prompts and sentences do besides: to perplexity, knowledge, refusals,
    boundaries, language and length.

    Args:
        circuit: in memory or as a file; the loaded one of a `SteeredModel`, else the model's own in `artifacts`, else the shipped one.
        questions: JSON-lines file of items with their checks; the shipped ones by default.
        judge: reads the emotion of everyday replies. base_url, key_env: of an OpenAI-compatible one.
        limits: what the result is held against, such as "perplexity=1.3,accuracy=10"; see `side_effects.settings.LIMITS`.
        quick: a few minutes' worth of it; settings that are given count.
        partial: folder that progress is kept in, so that the same call goes on; None keeps nothing. fresh: start over.
        settings: fields of `side_effects.settings.EffectsSettings`.

    Raises:
        UsageError, DataError: if the items or a setting make no sense, the judge has the weights of the model, or it said nothing of a
            reply: what was written is kept in `partial`. ArtifactError: for a circuit of another model or without a dial.
    """
    from emosteer.side_effects import measure as stage

    bare = plain_model(model)
    given: dict[str, Any] = {name: tuple(value) if isinstance(value, (list, tuple)) else value for name, value in settings.items()}
    chosen = EffectsSettings.quick(**given) if quick else EffectsSettings(**given)
    bounds = Limits() if limits is None else Limits.parse(limits)
    battery = battery_of(chosen, path_of(questions))
    ready, sha256 = circuit_of(model, circuit, Path(artifacts))
    ready = ready.without_examples()  # items say themselves what is wanted
    from emosteer.judges.huggingface import refuse_same_weights
    from emosteer.judges.registry import close_judges, judge_of, make_judges

    judges = make_judges(judge, base_url=base_url, key_env=key_env)  # before hours of writing, not after
    try:
        refuse_same_weights(judges, bare.sha256)
        with tempfile.TemporaryDirectory() as folder:
            place = path_of(partial) or Path(folder)
            how: dict[str, Any] = {"judge": judge, "limits": bounds, "batch_size": batch_size, "fresh": fresh}
            return stage.effects(bare, ready, sha256, battery, chosen, place, reader_of(judge_of(judges)), **how)
    finally:
        close_judges(judges)


def reader_of(judge: EmotionJudge) -> Reader:
    """Texts -> what each is read as.

    The reader raises DataError where the judge, or one of several, said nothing of a text: a missing opinion is not one that finds no
    emotion.
    """

    def read(texts: Sequence[str]) -> list[str | None]:
        opinions = judge.opinions(list(texts)) if texts else []
        missing = [opinion.problem for opinion in opinions if opinion.probabilities is None or opinion.problem]
        if missing:
            raise DataError(
                f"the judge {judge.name} said nothing of {len(missing)} of {len(texts)} replies ({missing[0]}); the replies are kept: "
                "run the same command again, or with another judge"
            )
        return [opinion.emotion() for opinion in opinions]

    return read


def harm_warnings(model_name: str, circuit: Path, strengths: Mapping[str, float], limits: Limits, root: Path) -> list[str]:
    """What is to be said where strengths of a circuit exceed limits, by what `effects` measured with it: one line each.

    Args:
        circuit: its file; strengths: emotion -> strength.

    Raises:
        ArtifactError: if the file of effects is damaged.
    """
    from emosteer.base.files import sha256_file

    candidates = (circuit.with_name("effects.safetensors"), Places.of(model_name, root).effects, packaged_effects(model_name))
    rows = find_rows(candidates, sha256_file(circuit))
    if rows is None:
        return [f"the limits cannot be checked: nobody has measured what {circuit} does besides; `emosteer effects` does"]
    return warnings_for(rows, strengths, limits)
