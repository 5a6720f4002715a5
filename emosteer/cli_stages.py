"""`emosteer extract`, `ablate`, `circuit` and `inspect`."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from emosteer.errors import ArtifactError, UsageError
from emosteer.options import (
    DEFAULT_MODEL,
    DeviceMapOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    LimitOption,
    ModelOption,
    RepliesOption,
    RootOption,
    ScenariosOption,
    SeedOption,
    finite,
)
from emosteer.prompts import ELICITATIONS, INSTRUCTION
from emosteer.scenarios import EMOTIONS, parse_emotions

if TYPE_CHECKING:
    from emosteer.circuit import Circuit
    from emosteer.directions import Directions
    from emosteer.extract import Settings
    from emosteer.model import Model
    from emosteer.pipeline import Data, Places
    from emosteer.scenarios import Bank
    from emosteer.workers import Crew

OutOption = Annotated[Path | None, typer.Option("--out", "-o", help="Where to write; artifacts/MODEL/ if not given.", metavar="FILE")]
DirectionsOption = Annotated[
    Path | None, typer.Option("--directions", help="What `extract` wrote; artifacts/MODEL/ if not given.", metavar="FILE")
]


def extract(
    model: ModelOption = DEFAULT_MODEL,
    scenarios: ScenariosOption = None,
    replies: RepliesOption = None,
    elicitation: Annotated[str, typer.Option(help="reply (states of the reply), tone, system or stimulus (state before it).")] = "reply",
    emotions: Annotated[str, typer.Option(help="Names with commas, any set; 'all' is the six.")] = "all",
    out: OutOption = None,
    instruction: Annotated[str, typer.Option(help="Appended to every prompt.")] = INSTRUCTION,
    holdout: Annotated[float, typer.Option(min=0, max=0.9, help="Share of scenarios that evidence is measured on.")] = 0.1,
    limit: LimitOption = None,
    batch_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens per forward pass; 1024 on a CPU, 16384 on a GPU.", show_default=False)
    ] = None,
    packed: Annotated[bool, typer.Option(help="Compute each group's shared prompt once.")] = True,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over instead of going on.")] = False,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    device_map: DeviceMapOption = None,
    dtype: DtypeOption = "auto",
    root: RootOption = Path("artifacts"),
    as_json: JsonOption = False,
) -> None:
    """Extract context-agnostic emotion directions, and contrast statistics of every head and neuron."""
    from emosteer.pipeline import Places, read_data

    wanted = parse_emotions(emotions, EMOTIONS, closed=False)
    if len(wanted) < 2:
        raise UsageError(f"expected at least two emotions to tell apart, found '{emotions}'")
    if elicitation not in ELICITATIONS:
        raise UsageError(f"unknown elicitation '{elicitation}'; expected {', '.join(ELICITATIONS)}")
    own = replies == "self"
    if own and elicitation != "reply":
        raise UsageError("--replies self belongs to --elicitation reply")
    data = read_data(scenarios, Path(replies) if replies and not own else None, "self" if own else elicitation, limit)
    from emosteer.devices import bound_kernel_caches
    from emosteer.extract import Settings, finish_checkpoint
    from emosteer.extract import extract as run
    from emosteer.model import Model
    from emosteer.workers import join

    crew = join()
    if not own:  # writing replies meets the same shapes again
        bound_kernel_caches()
    loaded = Model.load(model, device=device, dtype=dtype, device_map=device_map)
    places = Places.of(loaded.name, root)
    target = out or places.directions
    tokens = batch_tokens or (1024 if loaded.device.type == "cpu" else 16384)
    settings = Settings(wanted, elicitation, instruction, holdout, seed, tokens, packed)
    bank = _own_bank(loaded, data, wanted, target, settings, fresh, crew) if own else data.bank
    checkpoint = target.with_name(target.name + ".partial")
    found = run(loaded, data.groups, settings, bank=bank, data=data.hashes, checkpoint=checkpoint, fresh=fresh, crew=crew)
    found.save(target)
    finish_checkpoint(checkpoint)
    from emosteer.summaries import directions_summary, print_directions

    summary = {"file": str(target), **directions_summary(found)}
    typer.echo(json.dumps(summary, indent=2)) if as_json else print_directions(summary)


def _own_bank(model: Model, data: Data, emotions: tuple[str, ...], target: Path, settings: Settings, fresh: bool, crew: Crew) -> Bank:
    """The model's own replies, written beside the directions (`own-replies.jsonl`), and those that pass the filter
    (`own-bank.jsonl`, which `ablate --replies` takes)."""
    from emosteer.files import sha256_file, write_jsonl
    from emosteer.own_replies import own_bank
    from emosteer.progress import note

    file, kept = target.with_name("own-replies.jsonl"), target.with_name("own-bank.jsonl")
    bank, reasons = own_bank(model, data.groups, emotions, file, settings.instruction, seed=settings.seed, fresh=fresh, crew=crew)
    rows = [
        {"skeleton_id": key.scenario, "valence": key.valence, "emotion": emotion, "text": text}
        for key, replies in bank.items()
        for emotion, text in replies.items()
    ]
    write_jsonl(kept, rows)
    data.hashes[f"replies/{kept.name}"] = sha256_file(kept)
    note(f"own replies: {len(rows)} kept, {sum(reasons.values())} left out ({', '.join(f'{n} {why}' for why, n in reasons.most_common())})")
    return bank


def _directions(model: Model, given: Path | None, places: Places) -> tuple[Directions, Path]:
    """The directions to work from.

    Raises:
        ArtifactError: with the command that makes them, if they are not there, or if they are another model's.
    """
    from emosteer import artifacts
    from emosteer.directions import Directions

    path = given or places.directions
    if given is None and not path.exists():
        raise ArtifactError(
            f"there are no directions for {model.name} at {path}; run `emosteer extract --model {shlex.quote(model.reference)}` first"
        )
    found = Directions.load(path)
    artifacts.require_model(found.provenance, model.sha256, model.name, path)
    return found, path


def ablate(
    model: ModelOption = DEFAULT_MODEL,
    directions: DirectionsOption = None,
    scenarios: ScenariosOption = None,
    replies: Annotated[Path | None, typer.Option(help="The bank that the directions were made with.", metavar="FILE")] = None,
    out: OutOption = None,
    curves: Annotated[bool, typer.Option(help="Measure ablation and enhancement curves.")] = True,
    shares: Annotated[str, typer.Option(help="Shares of heads on the curves.")] = "0.02,0.05,0.1,0.25",
    kinds: Annotated[str, typer.Option(help="zero, mean, resample, enhance.")] = "zero,mean,resample,enhance",
    randoms: Annotated[int, typer.Option(min=0, help="Random sets of equal size per point.")] = 3,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts per point and emotion.")] = 4,
    strength: Annotated[float, typer.Option(help="Multiplier of the enhancement curves.")] = 2.0,
    neuron_shares: Annotated[str, typer.Option(help="Shares of neurons on the curves; '' for none.")] = "0.01",
    patch_groups: Annotated[int, typer.Option(min=0, help="Groups for attribution patching.")] = 6,
    true_units: Annotated[int, typer.Option(min=0, help="Units patched for real, half of them random.")] = 32,
    verify_prompts: Annotated[int, typer.Option(min=0, help="Prompts for the check of contributions against real ablation.")] = 1,
    verify_neurons: Annotated[int, typer.Option(min=0, help="Random neurons in that check (every head is in it).")] = 100,
    top: Annotated[int, typer.Option(min=1, help="Units to print per emotion.")] = 5,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    device_map: DeviceMapOption = None,
    dtype: DtypeOption = "auto",
    root: RootOption = Path("artifacts"),
    as_json: JsonOption = False,
) -> None:
    """Score every head and neuron, check the scores by intervening, and draw ablation and enhancement curves."""
    from emosteer.ablation import ABLATIONS, ENHANCE, CurveSettings

    chosen = tuple(name.strip() for name in kinds.split(",") if name.strip())
    for name in chosen:
        if name not in (*ABLATIONS, ENHANCE):
            raise UsageError(f"unknown kind '{name}'; expected {', '.join((*ABLATIONS, ENHANCE))}")
    finite(strength, "--strength")
    settings = CurveSettings(
        _shares(shares, "--shares"), _shares(neuron_shares, "--neuron-shares"), chosen, randoms, prompts, strength, seed=seed
    )
    from emosteer.files import sha256_file
    from emosteer.gathering import clear
    from emosteer.model import Model
    from emosteer.pipeline import Places, read_data
    from emosteer.scores import AblateSettings, pieces_of
    from emosteer.scores import ablate as run
    from emosteer.workers import join, parts

    crew = join()
    loaded = Model.load(model, device=device, dtype=dtype, device_map=device_map)
    places = Places.of(loaded.name, root)
    found, path = _directions(loaded, directions, places)
    own = path.with_name("own-bank.jsonl")
    if replies is None and f"replies/{own.name}" in found.provenance.data:
        replies = own  # the directions were made with the model's own replies
    data = read_data(scenarios, replies, found.elicitation)
    target = out or places.scores
    wanted = AblateSettings(
        patch_groups,
        true_units=true_units,
        verify_prompts=verify_prompts,
        verify_neurons=verify_neurons,
        seed=seed,
        curves=settings if curves else None,
    )
    partial = target.with_name(target.name + ".partial.jsonl")
    parents = {"directions": sha256_file(path)}
    scores = run(loaded, found, data.groups, wanted, bank=data.bank, partial=partial, data=data.hashes, parents=parents, crew=crew)
    scores.save(target)
    for file in (partial, *parts(partial).values()):
        file.unlink(missing_ok=True)
    clear(pieces_of(partial))
    from emosteer.summaries import print_scores, scores_summary

    summary = {"file": str(target), **scores_summary(scores, top)}
    typer.echo(json.dumps(summary, indent=2)) if as_json else print_scores(summary)


def _shares(text: str, name: str) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise UsageError(f"expected {name} to be numbers with commas, found '{text}'") from error
    if any(not 0 < share <= 1 for share in found):
        raise UsageError(f"expected {name} to lie above 0 and up to 1, found '{text}'")
    return found


def circuit(
    model: ModelOption = DEFAULT_MODEL,
    directions: DirectionsOption = None,
    scenarios: ScenariosOption = None,
    preset: Annotated[str, typer.Option(help="auto (smallest head circuit that keeps --share of the effect) or paper.")] = "auto",
    ranking: Annotated[str, typer.Option(help="contrast, raw or effect.")] = "contrast",
    heads: Annotated[float | None, typer.Option(help="Share of heads; the preset decides if not given.", show_default=False)] = None,
    neurons: Annotated[float | None, typer.Option(help="Share of neurons; the preset decides if not given.", show_default=False)] = None,
    share: Annotated[float, typer.Option(help="Share of the effect of all heads that 'auto' keeps.")] = 0.95,
    replies: RepliesOption = None,
    gain_steps: Annotated[
        int, typer.Option(min=0, help="Steps of learning how much each head adds, on the reply bank; 0 ranks heads instead.")
    ] = 40,
    keep: Annotated[float, typer.Option(help="Share of heads that learning keeps.")] = 0.5,
    strength: Annotated[
        str | None, typer.Option(help="Default strength: a number, or anger=6,fear=5,...; tuned if not given.", show_default=False)
    ] = None,
    tune: Annotated[bool, typer.Option(help="Tune the default strength on training prompts.")] = True,
    out: OutOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    device_map: DeviceMapOption = None,
    dtype: DtypeOption = "auto",
    root: RootOption = Path("artifacts"),
    as_json: JsonOption = False,
) -> None:
    """Assemble the circuits and measure how faithful they are."""
    from emosteer.assembly import CircuitSettings, assemble

    settings = CircuitSettings(preset, ranking, finite(heads, "--heads"), finite(neurons, "--neurons"), share, seed=seed)
    wanted = _strengths(strength)
    from emosteer.files import sha256_file
    from emosteer.gains import GainSettings
    from emosteer.model import Model
    from emosteer.pipeline import Places, read_data, without_development
    from emosteer.summaries import circuit_summary, print_circuit
    from emosteer.tuning import TuneSettings, tune_strength

    gains = GainSettings(gain_steps, keep=finite(keep, "--keep") or 0.0, seed=seed)
    loaded = Model.load(model, device=device, dtype=dtype, device_map=device_map)
    places = Places.of(loaded.name, root)
    found, path = _directions(loaded, directions, places)
    own = path.with_name("own-bank.jsonl")
    bank = Path(replies) if replies is not None else None
    if bank is None and f"replies/{own.name}" in found.provenance.data:
        bank = own  # the directions were made with the model's own replies
    # a ranking, a budget or a preset that is asked for is meant: gains are learned for the default circuit of `reply` directions
    learns = found.elicitation == "reply" and preset == "auto" and heads is None and neurons is None and gain_steps > 0
    data = read_data(scenarios, bank, "reply" if learns else "self")
    made = assemble(
        loaded,
        found,
        without_development(data.groups, scenarios) if learns else data.groups,
        settings,
        data={**found.provenance.data, **data.hashes},
        parents={"directions": sha256_file(path)},
        bank=data.bank,
        gain_settings=gains if learns else None,
    )
    named = set(wanted or {})
    if tune and "" not in named and not named >= set(made.emotions):
        made = tune_strength(loaded, made, data.groups, TuneSettings(seed=seed))
    if wanted is not None:
        made = made.with_strength(_per_emotion(wanted, made))
    target = out or places.circuit
    made.save(target)
    summary = {"file": str(target), **circuit_summary(made)}
    typer.echo(json.dumps(summary, indent=2)) if as_json else print_circuit(summary)


def _strengths(text: str | None) -> dict[str, float] | None:
    """Reads "3" (under the empty name: every emotion) or "anger=6,fear=5".

    Raises:
        UsageError: if it is neither.
    """
    if text is None:
        return None
    found: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = part.rpartition("=")
        try:
            value = float(number)
        except ValueError as error:
            raise UsageError(f"expected --strength to be a number or anger=6,fear=5,..., found '{text}'") from error
        finite(value, "--strength")
        found[name.strip()] = value
    return found


def _per_emotion(wanted: dict[str, float], made: Circuit) -> list[float]:
    """Default strengths in the circuit's order: as wanted, else as they were.

    Raises:
        UsageError: if a name is not an emotion of the circuit.
    """
    for name in wanted:
        if name:
            made.index(name)
    return [wanted.get(emotion, wanted.get("", made.strength[i].item())) for i, emotion in enumerate(made.emotions)]


def inspect(
    file: Annotated[Path, typer.Argument(help="Any artefact.", metavar="FILE")],
    as_json: JsonOption = False,
) -> None:
    """Print what an artefact holds and where it came from."""
    from emosteer import artifacts
    from emosteer.summaries import artifact_summary, print_artifact

    summary = artifact_summary(artifacts.load(file))
    typer.echo(json.dumps(summary, indent=2)) if as_json else print_artifact(summary)
