"""The stage `validate`: is a circuit necessary, sufficient, specific, one emotion's or all emotions', and stable? Each against at least
twenty random sets that match it. Interruptible at any moment; a rerun resumes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from emosteer.base import artifacts
from emosteer.base.artifacts import Provenance
from emosteer.base.errors import DataError
from emosteer.base.files import sha256_text
from emosteer.base.jsonl import JsonlLog, whole_rows
from emosteer.base.progress import bar
from emosteer.circuits.circuit import Circuit
from emosteer.circuits.validation.bank_rankings import BankContrasts, Parting, best, half_rankings, inclusion, read_contrasts
from emosteer.circuits.validation.bench import FOLLOWED, READ, Bench, References, neutral_means, readout_of, removed_by_heads
from emosteer.circuits.validation.findings import Row, findings
from emosteer.circuits.validation.overlaps import overlap_of, overlaps, shared_by_chance
from emosteer.circuits.validation.prepared import prepared
from emosteer.circuits.validation.settings import ValidateSettings
from emosteer.circuits.validation.trials import HALVES, READING, WHOLE, Sets, Trial, focus_label, focus_of, plan, sets_of
from emosteer.circuits.validation.unit_sets import circuit_sets
from emosteer.circuits.validation.validation import Validation
from emosteer.circuits.validation.written_replies import written_replies
from emosteer.directions.extract import batch_tokens_for
from emosteer.judges.jury import Jury
from emosteer.models.model import Model
from emosteer.models.sites import Head
from emosteer.scenarios.prompt_sets import KINDS, of_kinds
from emosteer.scenarios.scenarios import NEUTRAL, Bank, Group

#: A head that is in this share of the bootstraps is always there.
ALWAYS = 0.9
#: Reference prompts that what heads remove is measured on, one pass per emotion.
REMOVED_ON = 4
#: What trials share that are run together: (place of the prompt, elicitation, emotion that is asked for).
Cell = tuple[int, str, str]


def validate(
    model: Model,
    circuit: Circuit,
    groups: Sequence[Group],
    bank: Bank,
    settings: ValidateSettings,
    *,
    data: Mapping[str, str] | None = None,
    parents: Mapping[str, str] | None = None,
    partial: Path | None = None,
    jury: Jury | None = None,
) -> Validation:
    """Tries a circuit and its random rivals.

    Args:
        groups: prompts of the bank; those with a reply in every emotion of the circuit are used.
        partial: JSON-lines file that finished prompts are kept in, so that the same call goes on; None keeps nothing.
        jury: who reads replies that are written under ablation, if the settings ask for some.

    Raises:
        ArtifactError: if the circuit is another model's. DataError: if there are too few prompts with replies in all its emotions.
    """
    artifacts.require_model(circuit.provenance, model.sha256, model.name, "the circuit")
    usable, tried, references = drawn_prompts(circuit, groups, bank, settings)
    provenance = _provenance(model, settings, data or {}, parents or {})
    parted = [[str(group.key), group.kind, group.theme] for group in usable]
    told = {"bank": [[str(group.key), group.said, bank[group.key]] for group in usable], "emotions": circuit.emotions, "parted": parted}
    beside = partial.with_name(partial.name + ".prepared") if partial is not None else None
    contrasts, kept = prepared(beside, provenance, told, lambda: _read(model, circuit, bank, usable, references, settings))
    bench = bench_of(model, circuit, bank, tried, contrasts, kept, settings)
    plans = [plan(sets, circuit.emotions, settings) for sets in bench.sets]
    values = _run(bench, plans, partial, [parents or {}, data or {}])
    always = _counts(bench.sets, settings)
    included = inclusion(model, contrasts, always, settings.bootstraps, settings.seed)
    tables = {
        **findings(values, bench.sets, bench.halves, settings.seed),
        **_sharing(bench.sets, settings),
        "stable": _stable(model, contrasts, bench.sets, included, settings),
        "written": written_replies(bench, jury) if jury is not None and settings.written else [],
    }
    followed, read = (tuple(t for t in values if (t.elicitation == READING) == reading) for reading in (False, True))
    return Validation(
        circuit.emotions,
        tuple(str(group.key) for group in tried),
        bench.readout.layers,
        followed,
        read,
        torch.stack([values[trial].T for trial in followed]),
        torch.stack([values[trial].T for trial in read]) if read else torch.zeros(0, len(tried), len(READ)),
        included,
        bench.references.removed,
        tables,
        tuple(_notes(bench, usable, bank)),
        provenance,
    )


def drawn_prompts(
    circuit: Circuit, groups: Sequence[Group], bank: Bank, settings: ValidateSettings
) -> tuple[list[Group], list[Group], list[Group]]:
    """(prompts with a reply in every emotion, those of them that are tried, others that neutral means are taken from).

    Raises:
        DataError: as `validate`.
    """
    usable = [group for group in groups if set(circuit.emotions) <= bank.get(group.key, {}).keys()]
    if len(usable) <= settings.prompts:
        raise DataError(
            f"expected more than {settings.prompts} prompts with a reply in {', '.join(circuit.emotions)}, found {len(usable)}; "
            "give another bank with --replies, or fewer --prompts"
        )
    tried = drawn(usable, settings.prompts)
    held = {group.key for group in tried}
    return usable, tried, drawn([group for group in usable if group.key not in held], settings.references)


def _provenance(model: Model, settings: ValidateSettings, data: Mapping[str, str], parents: Mapping[str, str]) -> Provenance:
    return Provenance(
        model=model.name,
        model_sha256=model.sha256,
        template_sha256=model.template_sha256,
        method="ablation and holding of a circuit's units against matched random sets",
        params={**asdict(settings), "dtype": model.precision.removeprefix("torch."), "device": model.device.type},
        seed=settings.seed,
        data=dict(data),
        parents=dict(parents),
        versions=artifacts.versions(),
    )


def drawn(groups: Sequence[Group], count: int) -> list[Group]:
    """Prompts of all kinds by turns."""
    return of_kinds(groups, KINDS, count + len(KINDS))[:count]


def _read(
    model: Model, circuit: Circuit, bank: Bank, usable: Sequence[Group], references: Sequence[Group], settings: ValidateSettings
) -> tuple[BankContrasts, References]:
    """Everything that is read before the trials."""
    among = drawn(usable, settings.bank_groups)
    parting = Parting.of(usable)
    contrasts = read_contrasts(model, among, bank, circuit.emotions, circuit.instruction, batch_tokens_for(model), parting)
    neurons, longest = bool(len(circuit.neuron_index)), settings.reply_tokens
    means = neutral_means(model, references, bank, circuit.instruction, neurons, longest)
    removed = removed_by_heads(model, references[:REMOVED_ON], bank, circuit, means, settings.elicitations[0], longest)
    return contrasts, References(means, removed, contrasts.z.mean(0))


def bench_of(
    model: Model,
    circuit: Circuit,
    bank: Bank,
    tried: Sequence[Group],
    contrasts: BankContrasts,
    kept: References,
    settings: ValidateSettings,
) -> Bench:
    """Where trials are run, once everything is read that comes before them."""
    wholes = [circuit_sets(circuit, e) for e in range(len(circuit.emotions))]
    counts = [_focus_count(whole.heads, settings) for whole in wholes]
    halves = half_rankings(model, contrasts, counts, torch.zeros_like(wholes[0].neurons))
    sets = sets_of(model, circuit, kept.removed, halves, settings)
    parted = [contrasts.parting.half(group) for group in tried]
    return Bench(model, circuit, bank, tried, parted, sets, kept, readout_of(circuit, model.device), settings)


def _focus_count(heads: Tensor, settings: ValidateSettings) -> int:
    """How many heads an emotion has at the focus."""
    return min(int(heads.sum()), max(1, round(settings.focus * heads.numel())))


def _counts(sets: Sequence[Sets], settings: ValidateSettings) -> list[int]:
    return [_focus_count(one.own[WHOLE].heads, settings) for one in sets]


def cells_of(plans: Sequence[Sequence[Trial]], n_prompts: int) -> dict[Cell, list[Trial]]:
    """The trials that are run together, on every prompt."""
    cells: dict[Cell, list[Trial]] = {}
    for trial in (trial for trials in plans for trial in trials):
        for place in range(n_prompts):
            cells.setdefault((place, trial.elicitation, trial.asked), []).append(trial)
    return cells


def _run(bench: Bench, plans: Sequence[Sequence[Trial]], partial: Path | None, told: object) -> dict[Trial, Tensor]:
    """All trials on all prompts: trial -> [figure, prompt]."""
    cells = cells_of(plans, len(bench.groups))
    model, circuit = bench.model, bench.circuit
    texts = [[group.said, bench.bank[group.key]] for group in bench.groups]
    origin, chosen = circuit.provenance.origin(), asdict(bench.settings)
    shaping = [model.sha256, model.precision, circuit.emotions, origin, chosen, texts, list(bench.halves), told]
    key = sha256_text(json.dumps([*shaping, [vars(t) for trials in plans for t in trials]], sort_keys=True, default=str))
    log = JsonlLog(partial) if partial is not None else None
    rows = whole_rows(partial) if partial is not None and partial.is_file() else []
    done = {tuple(row["cell"]): row["figures"] for row in rows if row.get("key") == key}
    with bar("trials (prompts and emotions)", len(cells), len(done)) as advance:
        for cell, trials in cells.items():
            if cell not in done:
                done[cell] = bench.run(*cell, trials)
                if log:
                    log.append({"key": key, "cell": list(cell), "figures": done[cell]})
                advance(1)
    found: dict[Trial, Tensor] = {}
    for (place, _, _), trials in cells.items():
        for trial, figures in zip(trials, done[(place, trials[0].elicitation, trials[0].asked)], strict=True):
            width = len(READ if trial.elicitation == READING else FOLLOWED)
            found.setdefault(trial, torch.zeros(width, len(bench.groups)))[:, place] = torch.tensor(figures)
    return found


def _sharing(sets: Sequence[Sets], settings: ValidateSettings) -> dict[str, list[Row]]:
    """Overlaps of pairs of emotions, and heads that several share, against chance."""
    pairs, shared = list[Row](), list[Row]()
    for size in dict.fromkeys((focus_label(sets, settings), WHOLE)):
        heads = {one.emotion: one.own[one.size_here(size)].heads for one in sets}
        pairs += [{"size": size, **row} for row in overlaps(heads)]
        total = torch.stack(list(heads.values())).sum(0)
        for least in range(2, len(sets) + 1):
            names = [str(Head(layer, head)) for layer, head in (total >= least).nonzero().tolist()]
            expected = shared_by_chance(list(heads.values()), least)
            shared.append({"size": size, "at_least": least, "heads": len(names), "expected": expected, "names": names})
    return {"overlaps": pairs, "shared": shared}


def _stable(model: Model, contrasts: BankContrasts, sets: Sequence[Sets], included: Tensor, settings: ValidateSettings) -> list[Row]:
    """Which heads a ranking of the bank always has, and how much the rankings of two halves of the prompt kinds agree."""
    counts = _counts(sets, settings)
    weights = torch.stack([(contrasts.halves == half).float() for half in (0, 1)])
    parted = bool(weights.sum(1).all())
    halves = best(contrasts.scores(model, weights), counts) if parted else None
    rows: list[Row] = []
    for e, one in enumerate(sets):
        size = focus_of(one, settings)
        mine, always = one.own[size].heads, included[e] >= ALWAYS
        agreed = overlap_of(halves[0, e], halves[1, e]) if halves is not None else {}
        rows.append(
            {
                "emotion": one.emotion,
                "size": size,
                "heads": counts[e],
                "always": int(always.sum()),
                "circuit": int(mine.sum()),
                "held": int((mine & always).sum()),
                "names": [str(Head(layer, head)) for layer, head in always.nonzero().tolist()],
                "halves": agreed.get("jaccard"),
                "halves_expected": agreed.get("expected"),
            }
        )
    return rows


def _notes(bench: Bench, usable: Sequence[Group], bank: Bank) -> list[str]:
    notes = []
    if not all(NEUTRAL in bank[group.key] for group in usable):
        notes.append("the bank lacks neutral replies: another emotion's stand in for them where neutral text is read")
    if not all(set(HALVES) <= one.own.keys() for one in bench.sets):
        notes.append("the prompts have no two halves of kinds: no ranking was tried on the other half")
    return notes
