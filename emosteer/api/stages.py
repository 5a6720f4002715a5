"""The stages as functions: extract, ablate, assemble, calibrate. Each is what the command of its name does (`assemble`: `circuit`), with
the shipped data unless told otherwise, and returns the artefact instead of writing it. No torch at import."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from emosteer.api.inputs import PathLike, bank_of, circuit_of, dialled_with, directions_of, jury_of, path_of, plain_model
from emosteer.attribution.settings import AblateSettings
from emosteer.base.errors import UsageError
from emosteer.base.processes import ALONE, Crew
from emosteer.calibration.settings import GROUPS, CalibrateSettings, TuneSettings
from emosteer.circuits.places import ARTIFACTS
from emosteer.circuits.settings import CircuitSettings, GainSettings, VectorSettings
from emosteer.directions.settings import Settings
from emosteer.generation.decoding import Decoding
from emosteer.judges.registry import PANEL
from emosteer.scenarios.emotions import EMOTIONS, emotion_key, parse_emotions
from emosteer.scenarios.prompt_sets import KINDS
from emosteer.scenarios.shipped import development_groups, read_data, without_development
from emosteer.writing.settings import BATCH_SIZE

if TYPE_CHECKING:
    from emosteer.api.options import AblateOptions, AssembleOptions, CalibrateOptions, ExtractOptions
    from emosteer.api.steered_model import SteeredModel
    from emosteer.attribution.scores import Scores
    from emosteer.circuits.circuit import Circuit
    from emosteer.directions.directions import Directions
    from emosteer.judges.protocol import EmotionJudge
    from emosteer.models.model import Model
    from emosteer.scenarios.scenarios import Group
    from emosteer.scenarios.shipped import Data


def extract(
    model: Model | SteeredModel,
    *,
    scenarios: PathLike | None = None,
    replies: PathLike | None = None,
    limit: int | None = None,
    checkpoint: PathLike | None = None,
    fresh: bool = False,
    **settings: Unpack[ExtractOptions],
) -> Directions:
    """Extracts emotion directions at every layer, and contrast statistics of every head and neuron.

    Args:
        scenarios: SEV file; replies: bank; limit: use this many scenario-events, evenly spread.
        checkpoint: file that progress is kept in, so that the same call goes on after an interruption; fresh: start over.
        settings: fields of `directions.settings.Settings`; all six emotions by default. emotions may be a text as the command takes it, a
            set of emotions among others ("plutchik8").

    Raises:
        UsageError, DataError: if the data or a setting makes no sense. DegenerateDirection: if the data do not tell the emotions apart.
    """
    from emosteer.directions import extract as stage

    bare = plain_model(model)
    defaults: ExtractOptions = {"emotions": EMOTIONS, "batch_tokens": stage.batch_tokens_for(bare)}
    named: ExtractOptions = {**defaults, **settings}
    wanted = named["emotions"]
    names = parse_emotions(wanted, closed=False) if isinstance(wanted, str) else tuple(wanted)
    chosen = Settings(**{**named, "emotions": names})  # type: ignore[arg-type]
    if len(chosen.emotions) < 2:
        raise UsageError(f"expected at least two emotions to tell apart, found {', '.join(chosen.emotions) or 'none'}")
    data = read_data(path_of(scenarios), path_of(replies), chosen.elicitation, limit, chosen.emotions)
    file = path_of(checkpoint)
    made = stage.extract(bare, data.groups, chosen, bank=data.bank, data=data.hashes, checkpoint=file, fresh=fresh)
    if file is not None:
        stage.finish_checkpoint(file)
    return made


def ablate(
    model: Model | SteeredModel,
    directions: Directions | PathLike | None = None,
    *,
    scenarios: PathLike | None = None,
    replies: PathLike | None = None,
    partial: PathLike | None = None,
    artifacts: PathLike = ARTIFACTS,
    crew: Crew = ALONE,
    **settings: Unpack[AblateOptions],
) -> Scores:
    """Scores every head and neuron in four ways, checks the scores by intervening, and measures ablation and enhancement curves.

    Args:
        directions: in memory or as a file; the model's own in `artifacts` by default.
        scenarios: SEV file; replies: the bank that the directions were made with.
        partial: JSON-lines file that finished curve points are kept in, so that the same call goes on.
        settings: fields of `attribution.settings.AblateSettings`; curves=None leaves the curves out.

    Raises:
        ArtifactError: if the directions are missing or another model's. UsageError, DataError: if the data or a setting makes no sense.
    """
    from emosteer.attribution import ablate as stage

    bare = plain_model(model)
    made, sha256, path = directions_of(bare, directions, Path(artifacts))
    bank = bank_of(replies, made, path)
    data = read_data(path_of(scenarios), bank, made.elicitation, emotions=made.emotions)
    return stage.ablate(
        bare,
        made,
        data.groups,
        AblateSettings(**settings),
        bank=data.bank,
        partial=path_of(partial),
        data=data.hashes,
        parents={"directions": sha256},
        crew=crew,
    )


def assemble(
    model: Model | SteeredModel,
    directions: Directions | PathLike | None = None,
    *,
    scenarios: PathLike | None = None,
    replies: PathLike | None = None,
    learn: str | None = None,
    gain_steps: int | None = None,
    keep: float | None = None,
    content: float | None = None,
    budget: float | None = None,
    units: str | None = None,
    select: str | None = None,
    learn_residual: bool | None = None,
    examples: PathLike | None = None,
    tune: bool = True,
    strength: float | Mapping[str, float] | None = None,
    artifacts: PathLike = ARTIFACTS,
    **settings: Unpack[AssembleOptions],
) -> Circuit:
    """Assembles one circuit per emotion and measures how faithful it is. What each head adds is learned on the bank, unless a preset,
    a share of units or `gain_steps=0` asks for a ranking.

    Args:
        directions: in memory or as a file; the model's own in `artifacts` by default.
        scenarios: SEV file; replies: bank that is learned on.
        learn: what is learned of each head, "outputs" or "gains"; gain_steps, keep, content: how long, the share of heads that is kept,
            and the weight of keeping to the prompt (`circuits.settings.GainSettings`).
        budget: share of the heads, and of the neurons, that a circuit with outputs of both may have, in place of `keep`; units: "both",
            "heads" or "neurons"; select: by what they are chosen (`circuits.selection`).
        learn_residual: whether to learn residual vectors in the same way, for the contest (method "learned-residual"), which takes as long
            again; where gains are learned, unless told otherwise.
        examples: file of exchanges that stand before prompts that are steered, or "none"; the shipped ones by default.
        tune: find the default strength on training prompts; strength: the default strength, for all emotions or by emotion ("" for
            those not named).
        settings: fields of `circuits.settings.CircuitSettings`.

    Raises:
        ArtifactError: if the directions are missing or another model's. UsageError, DataError: if the data or a setting makes no sense.
    """
    from emosteer.calibration.default_strength import tune_strength
    from emosteer.circuits import assemble as stage
    from emosteer.scenarios.examples import examples_of

    bare = plain_model(model)
    named = {"learn": learn, "gain_steps": gain_steps, "keep": keep, "content": content, "learn_residual": learn_residual}
    named |= {"budget": budget, "units": units, "select": select}
    inputs = {"scenarios": scenarios, "replies": replies, "tune": tune, "strength": strength, "artifacts": artifacts}
    work = assembly_of(bare, directions, **named, **inputs, **settings)  # type: ignore[arg-type]
    shown = examples_of(path_of(examples), work.directions.emotions)
    circuit = stage.assemble(
        bare,
        work.directions,
        work.groups,
        work.settings,
        data={**work.directions.provenance.data, **work.data.hashes},
        parents={"directions": work.sha256},
        bank=work.data.bank,
        gain_settings=work.gains,
        vector_settings=VectorSettings() if work.residual else None,
    )
    if work.tunes:
        circuit = tune_strength(bare, circuit, work.data.groups, TuneSettings(seed=work.settings.seed))
    circuit = replace(circuit, examples=shown)
    return circuit.with_strength(_per_emotion(work.strengths, circuit)) if work.strengths else circuit


@dataclass(frozen=True, eq=False)
class Assembly:
    """What `assemble` works with. gains: how the heads are learned, None for a ranking; residual: whether vectors of the stream are, too;
    strengths: default strengths by emotion that were asked for, "" for all others; tunes: whether the others are found."""

    directions: Directions
    sha256: str
    data: Data
    groups: Sequence[Group]
    settings: CircuitSettings
    gains: GainSettings | None
    residual: bool
    strengths: dict[str, float]
    tunes: bool


def assembly_of(
    bare: Model,
    directions: Directions | PathLike | None,
    *,
    scenarios: PathLike | None,
    replies: PathLike | None,
    learn: str | None,
    gain_steps: int | None,
    keep: float | None,
    content: float | None,
    budget: float | None,
    units: str | None,
    select: str | None,
    learn_residual: bool | None,
    tune: bool,
    strength: float | Mapping[str, float] | None,
    artifacts: PathLike,
    **settings: Unpack[AssembleOptions],
) -> Assembly:
    """Reads what `assemble` needs, and decides what its arguments, which these are, leave open. Errors as there."""
    chosen = CircuitSettings(**settings)
    named = {"learn": learn, "steps": gain_steps, "keep": keep, "content": content, "budget": budget, "units": units, "select": select}
    given = {name: value for name, value in named.items() if value is not None}
    gains = GainSettings(**given, seed=chosen.seed)  # type: ignore[arg-type]
    wanted = {"": strength} if isinstance(strength, (int, float)) else {emotion_key(name): s for name, s in (strength or {}).items()}
    made, sha256, path = directions_of(bare, directions, Path(artifacts))
    # a ranking, a budget or a preset that is asked for is meant: gains are learned for the default circuit of `reply` directions
    ranks = chosen.preset != "auto" or chosen.head_share is not None or chosen.neuron_share is not None or not gains.steps
    learns = made.elicitation == "reply" and not ranks
    if gains.budget is not None and not learns:
        raise UsageError(
            "within a budget the units' outputs are learned; leave out --preset, --heads, --neurons and --gain-steps 0, and use directions "
            "of the elicitation 'reply'"
        )
    idle = [name for name in ("ranking", "share") if getattr(chosen, name) != getattr(CircuitSettings, name)] if learns else []
    if idle:
        raise UsageError(f"--{idle[0]} is of ranked heads, and here they are learned; add --gain-steps 0, or leave it out")
    taught = {"learn": gains.learn, "keep": gains.keep, "content": gains.content} if not learns else {}
    idle = [name for name, value in taught.items() if value != getattr(GainSettings, name)]
    if idle or (not learns and gains.steps not in (0, GainSettings.steps)):
        raise UsageError(
            f"--{idle[0] if idle else 'gain-steps'} is of learned heads, and here they are ranked; leave it out, or --preset, --heads, "
            "--neurons and --gain-steps 0, and use directions of the elicitation 'reply'"
        )
    if learn_residual and not learns:
        raise UsageError(
            "residual vectors are learned beside gains, on the same data; leave out --preset, --heads, --neurons and --gain-steps 0, and "
            "use directions of the elicitation 'reply'"
        )
    file, bank = path_of(scenarios), bank_of(replies, made, path)
    data = read_data(file, bank, "reply" if learns else "self", emotions=made.emotions)
    groups = without_development(data.groups, file) if learns else data.groups
    tunes = tune and "" not in wanted and not wanted.keys() >= set(map(emotion_key, made.emotions))
    return Assembly(made, sha256, data, groups, chosen, gains if learns else None, learn_residual is not False, wanted, tunes)


def _per_emotion(wanted: Mapping[str, float], circuit: Circuit) -> list[float]:
    """Default strengths in the circuit's order: as wanted, else as they were.

    Raises:
        UsageError: if a name is not an emotion of the circuit.
    """
    named = {circuit.index(name): s for name, s in wanted.items() if name}
    return [named.get(i, wanted.get("", circuit.strength[i].item())) for i in range(len(circuit.emotions))]


def calibrate(
    model: Model | SteeredModel,
    circuit: Circuit | PathLike | None = None,
    *,
    judge: str | EmotionJudge | Sequence[EmotionJudge] = PANEL,
    scenarios: PathLike | None = None,
    kinds: Sequence[str] = KINDS,
    groups: int = GROUPS,
    kept: PathLike | None = None,
    decoding: Decoding | None = None,
    instruction: str | None = None,
    examples: PathLike | None = None,
    batch_size: int = BATCH_SIZE,
    artifacts: PathLike = ARTIFACTS,
    **settings: Unpack[CalibrateOptions],
) -> Circuit:
    """Fits the intensity dial: which strength gives which judged intensity, capped where the text would break.

    Args:
        circuit: in memory or as a file; the loaded one of a `SteeredModel`, else the model's own, by default.
        judge: a specification (several judges with commas make a panel), what `make_judge` returns, or a list of such judges.
        scenarios: prompt file, else the shipped development prompts; kinds: of prompts; groups: prompts to write to, evenly of all kinds.
        kept: JSON-lines file of replies and opinions, so that the same call goes on; None keeps nothing.
        instruction: appended to every prompt, and kept with the circuit; its own by default. examples: file of exchanges that stand before
            the prompts, or "none", and kept with it; its own by default.
        settings: fields of `calibration.settings.CalibrateSettings`.

    Returns:
        The circuit with its dial (`circuit.calibrated`) and default strengths.

    Raises:
        ArtifactError: if there is no circuit. UsageError, DataError: if a setting makes no sense or the judge fails.
    """
    from emosteer.base.jsonl import KeyedLog
    from emosteer.calibration import calibrate as stage
    from emosteer.calibration.trials import Trials
    from emosteer.judges.huggingface import refuse_same_weights

    bare = plain_model(model)
    chosen = CalibrateSettings(**settings)
    prompts = development_groups(groups, path_of(scenarios), kinds)
    panel = jury_of(judge)
    ready, sha256 = circuit_of(model, circuit, Path(artifacts))
    ready = dialled_with(ready, instruction, examples)
    with contextlib.ExitStack() as stack:
        log = path_of(kept) or Path(stack.enter_context(tempfile.TemporaryDirectory())) / "kept.jsonl"
        replies = KeyedLog(log)
        jury = panel(replies)
        refuse_same_weights(jury.judges, bare.sha256)
        trials = Trials(bare, ready, jury, prompts.groups, replies, decoding or Decoding.usual(), batch_size)
        return stage.calibrate(trials, chosen, prompts.hashes, {"circuit": sha256})
