"""What each stage will cost: its work counted exactly, and timed by a short trial of it (`trials`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from emosteer.api.costs import trials
from emosteer.api.costs.cost import REPLY_BYTES, Cost, Part
from emosteer.api.costs.memory import WRITING, needed
from emosteer.api.costs.trials import plus, times
from emosteer.attribution.ablate import compared_groups
from emosteer.attribution.curves import Runner, TextScore, conditions, kept_points, require_prompts
from emosteer.attribution.gradients import attribution_patching, importance_and_effects, prompt_samples, true_patches
from emosteer.attribution.settings import AblateSettings, CurveSettings
from emosteer.attribution.unit_scores import contrast_scores, top_units
from emosteer.calibration.calibrate import INTENSITIES, grid
from emosteer.calibration.settings import CalibrateSettings, TuneSettings
from emosteer.calibration.trials import require_labels, written_before
from emosteer.circuits.circuit import Circuit
from emosteer.circuits.methods import METHODS
from emosteer.circuits.settings import CircuitSettings, GainSettings
from emosteer.directions.activations import TokenRow
from emosteer.directions.directions import Directions, reference_directions, stable_band
from emosteer.directions.extract import work_of
from emosteer.directions.settings import Settings
from emosteer.evaluation.evaluate import Strengths, absolute_strength
from emosteer.evaluation.settings import EvaluationSettings
from emosteer.generation.decoding import Decoding
from emosteer.generation.generate import Request
from emosteer.judges.choosing.chooser import Chooser
from emosteer.judges.jury import Jury
from emosteer.models.model import Model
from emosteer.models.sites import RESID_POST, Head, Site
from emosteer.probing.probe import SITE_KINDS
from emosteer.probing.reading import frame, text_row
from emosteer.probing.settings import HEADS, ProbeSettings
from emosteer.probing.texts import Texts
from emosteer.scenarios.examples import shown
from emosteer.scenarios.scenarios import Bank, Group, Message
from emosteer.writing.contest_writer import Cell, ContestWriter, cells_of
from emosteer.writing.jobs import asked_request


def of_extract(model: Model, groups: Sequence[Group], settings: Settings, bank: Bank | None, checkpoint: Path | None = None) -> Cost:
    """Raises what `extract` raises of its data."""
    work = work_of(model, groups, settings, bank)
    kept = work.kept(checkpoint) if checkpoint is not None else set()
    left = [batch for number, batch in enumerate(work.batches) if number not in kept]
    tokens = sum(sample.cost if settings.packed else sample.cost_alone for batch in left for sample in batch)
    per_token = trials.reading(model, work, settings.packed) if left else 0.0
    size = sum(tensor.nbytes for tensor in work.sums(model).state().values())
    return Cost(
        "extract",
        (Part("passes", len(left), tokens, times(tokens, per_token)),),
        needed(model, "extract"),
        size,
        f"{len(kept)} of {len(work.batches)} passes are kept" if kept else "",
    )


def of_ablate(
    model: Model,
    directions: Directions,
    groups: Sequence[Group],
    settings: AblateSettings,
    bank: Bank | None,
    partial: Path | None = None,
) -> Cost:
    """The passes with gradients and patches, the check, and the curves' points, one of which is tried."""
    v_ref, scores = reference_directions(directions, stable_band(directions)), contrast_scores(model, directions)
    emotions = len(directions.emotions)
    prompts = prompt_samples(model, groups, settings.effect_prompts, emotions, directions.instruction)
    one = trials.timed(lambda: importance_and_effects(model, prompts[:1], directions, v_ref))
    parts = [Part("prompts with gradients", len(prompts), sum(s.cost_alone for s in prompts), times(len(prompts), one))]
    if settings.patch_groups:
        samples = compared_groups(model, directions, groups, bank, settings.patch_groups)
        one = trials.timed(lambda: attribution_patching(model, samples[:1], v_ref, directions))
        count = len(samples) + min(settings.true_groups, len(samples)) * bool(settings.true_units)
        parts.append(Part("groups patched by gradient", count, sum(s.cost_alone for s in samples), times(count, one)))
        if settings.true_units:
            units, emotion = top_units(scores.heads[0], 16, Head), samples[0].held[0]
            one = trials.timed(lambda: true_patches(model, samples[:1], v_ref, emotion, units, directions))
            passes = min(settings.true_groups, len(samples)) * -(-settings.true_units // 16)
            parts.append(Part("passes with units patched", passes, 0, times(passes, one)))
    if settings.curves is not None:
        parts.append(_points(model, directions, groups, settings.curves, partial))
    return Cost(
        "ablate", tuple(parts), needed(model, "extract"), 4 * emotions * 4 * scores.heads[0].numel() + 4 * 4 * scores.neurons.numel()
    )


def _points(model: Model, directions: Directions, groups: Sequence[Group], settings: CurveSettings, partial: Path | None) -> Part:
    if not model.family.has_neurons:
        settings = replace(settings, neuron_shares=())
    require_prompts(groups, settings)
    band, scores = stable_band(directions), contrast_scores(model, directions)
    points = conditions(settings)
    count = max(0, len(points) - (kept_points(partial, model, directions, groups, settings) if partial is not None else 0))
    chosen = list(groups[: settings.n_prompts])
    run = Runner(model, directions, scores, chosen, TextScore(model, directions, band, directions.instruction), settings)
    replies = len(chosen) * len(directions.emotions)
    tried = next((point for point in points if point.kind == "zero"), points[0])
    seconds = trials.timed(lambda: run(tried)) if count else 0.0
    return Part(f"points of curves, {replies} replies each", count, count * replies * settings.max_new_tokens, times(count, seconds))


def of_circuit(
    model: Model,
    emotions: Sequence[str],
    instruction: str,
    groups: Sequence[Group],
    bank: Bank | None,
    settings: CircuitSettings,
    gains: GainSettings | None,
    residual: bool,
    tuned: bool,
) -> Cost:
    """Learning, measuring and tuning. gains: how the heads are learned, None for a ranking; residual: vectors of the stream as well."""
    prompts = prompt_samples(model, groups, settings.n_prompts, len(emotions), instruction)
    ids = prompts[0].prompts[0]
    width = len(ids)
    rows = [TokenRow(ids, tuple(range(width)), (0,) * width, ((width - 1,),))] * (5 + settings.n_random)
    per_token = trials.reading_rows(model, rows, [Site(model.shape.n_layers - 1, RESID_POST)], len(rows) * width)
    passes = len(prompts) * len(emotions)
    measured = Part("passes that measure", passes, passes * len(rows) * width, times(passes * len(rows) * width, per_token))
    parts = [measured]
    if gains is not None and bank is not None and gains.steps:
        one = trials.learning(model, groups, bank, emotions, instruction, gains)
        steps = gains.steps * (2 if residual else 1)
        parts.insert(0, Part(f"steps of learning on {gains.groups} prompts each", steps, 0, times(steps * gains.groups, one)))
    if tuned:
        tune = TuneSettings()
        grid = len(tune.residual_strengths) + (0 if gains is not None else len(tune.strengths))
        requests = [asked_request(model, str(g.key), None, g.text, "none", instruction, g.earlier, False) for g in groups[: tune.n_prompts]]
        replies = len(requests) * (1 + grid * len(emotions))
        decoding = Decoding(max_new_tokens=tune.max_new_tokens, seed=tune.seed)
        seconds = trials.writing(model, None, requests, decoding, min(tune.batch_size, len(requests) * len(emotions)))
        parts.append(Part("replies that tune the strength", replies, replies * tune.max_new_tokens, times(replies, seconds), at_most=True))
    shape = model.shape
    size = 4 * len(emotions) * shape.n_layers * (shape.n_heads * shape.d_head + shape.d_model * (2 if residual else 1))
    return Cost("circuit", tuple(parts), needed(model, "circuit"), size)


def of_calibrate(
    model: Model,
    circuit: Circuit,
    jury: Jury,
    groups: Sequence[Group],
    settings: CalibrateSettings,
    decoding: Decoding,
    batch_size: int,
    check: bool = False,
) -> Cost:
    """At most: emotions whose text has broken are not tried any stronger. check: other prompts at the dial's steps instead."""
    require_labels(circuit.emotions)
    strengths = len(INTENSITIES) - 1 if check else len(grid(settings, bool(circuit.examples))) + settings.refine
    wanted = len(groups) * (1 + len(circuit.emotions) * strengths)
    kept = written_before(model, circuit, groups, jury.kept, decoding)
    examples = shown(circuit.examples, circuit.emotions[:1], circuit.instruction)
    requests = [_request(model, group, circuit.instruction, decoding, examples) for group in groups]
    return _written("calibrate", model, circuit, jury, requests, decoding, batch_size, wanted, min(kept, wanted), groups)


def of_evaluate(
    contest: ContestWriter,
    circuit: Circuit,
    jury: Jury,
    dev: Sequence[Group],
    test: Sequence[Group],
    defaults: Mapping[str, Strengths],
    settings: EvaluationSettings,
) -> Cost:
    """The replies of both splits, as `evaluation.evaluate` wants them."""
    cells: list[Cell] = []
    for method in settings.methods:
        own = dev[: settings.control_groups] if METHODS[method].controls else dev
        for dose in settings.doses if method in defaults else [None]:
            strengths = (
                {e: absolute_strength(dose, s) for e, s in defaults[method].items()}
                if dose is not None
                else dict.fromkeys(contest.emotions)
            )
            cells += cells_of(method, own, strengths)
    keys = {contest.key(cell) for cell in cells}
    reading = sum(len(cells_of(method, test, dict.fromkeys(contest.emotions))) for method in settings.methods)
    wanted, there = len(keys) + reading, set(contest.replies.rows)
    mine = len(keys & there)  # of other settings nothing can be used; which strengths the test split gets is not known yet
    kept = mine + min(len(there - keys), reading) if mine else 0
    examples = shown(contest.examples, contest.emotions[:1], contest.instruction)
    requests = [_request(contest.model, group, contest.instruction, contest.decoding, examples) for group in test]
    return _written(
        *("evaluate", contest.model, circuit, jury, requests, contest.decoding, contest.batch_size, wanted, kept, test),
        contest.chooser,
    )


def _request(model: Model, group: Group, instruction: str, decoding: Decoding, examples: Sequence[Message]) -> Request:
    return asked_request(model, str(group.key), None, group.text, "none", instruction, group.earlier, decoding.guides, examples)


def _written(
    command: str,
    model: Model,
    circuit: Circuit,
    jury: Jury,
    requests: Sequence[Request],
    decoding: Decoding,
    batch_size: int,
    wanted: int,
    kept: int,
    groups: Sequence[Group],
    chooser: Chooser | None = None,
) -> Cost:
    """Replies written, their likelihood, and what the judges read."""
    left = wanted - kept
    size = min(batch_size, max(1, left))
    seconds = trials.writing(model, circuit, requests, decoding, size, chooser=chooser) if left else 0.0
    read = trials.judging(jury, [group.said for group in groups]) if left else 0.0
    notes = tuple(f"asks {judge.name} {left:,} times, which is not in the time" for judge in jury.judges if judge.key in jury.paid)
    return Cost(
        command,
        (
            Part("replies", left, left * decoding.max_new_tokens, times(left, seconds), at_most=True),
            Part("readings by judges", left * len(jury.judges), 0, times(left, read), at_most=True),
        ),
        needed(model, WRITING),
        wanted * REPLY_BYTES,
        f"{kept:,} of {wanted:,} replies are kept" if kept else "",
        notes,
    )


def of_probe(model: Model, texts: Texts, settings: ProbeSettings) -> Cost:
    """Passes that read, and probes that are fitted to every place: fits take most of the time."""
    before, shape = frame(model), model.shape
    rows = [text_row(model, before, text.text, settings.read, settings.longest) for text in texts.texts]
    sites = [Site(layer, SITE_KINDS[kind]) for kind in settings.kinds for layer in range(shape.n_layers)]
    per_token = trials.reading_rows(model, rows, sites, settings.batch_tokens)
    tokens = sum(len(row.ids) for row in rows)
    mean = tokens / len(rows)
    room = model.shape.context - len(before) - settings.longest
    furthest = max((distance for distance in settings.distances if distance <= room), default=0)
    more = min(settings.followed, len(rows)) * (mean + furthest) * bool(set(settings.kinds) - {HEADS})
    more += min(settings.prompted, len(texts.test)) * 2 * mean * (1 + settings.shots * len(texts.labels))
    more += min(settings.moved, len(texts.test)) * mean * (2 * len(texts.labels) + 1)
    seconds: float | None = 0.0
    fits = 0
    for kind in settings.kinds:
        for hidden in [0] + [settings.hidden] * bool(settings.hidden and kind != HEADS):
            units = shape.n_heads if kind == HEADS else 1
            width = shape.d_head if kind == HEADS else shape.d_model
            seconds = plus(seconds, times(shape.n_layers, trials.fitting(len(rows), units, width, len(texts.labels), hidden, settings)))
            fits += shape.n_layers
    size = 4 * len(rows) * sum(model.width(site.kind) for site in sites)
    return Cost(
        "probe",
        (
            Part("texts", len(rows), tokens, times(tokens, per_token)),
            Part("tokens of texts followed, asked about and moved", round(more), 0, times(more, per_token)),
            Part("places to fit probes at", fits, 0, seconds),
        ),
        needed(model, "extract"),
        size,
    )
