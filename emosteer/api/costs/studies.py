"""What the studies of a circuit will cost, `heads` and `validate`: their work counted exactly, and timed by a short trial of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from emosteer.api.costs import trials
from emosteer.api.costs.cost import Cost, Part
from emosteer.api.costs.memory import needed
from emosteer.api.costs.trials import plus, times
from emosteer.circuits.circuit import Circuit
from emosteer.circuits.heads.checks import Pair, check_text, text_row_of
from emosteer.circuits.heads.reading import complete_groups, described_heads, read
from emosteer.circuits.heads.settings import HeadSettings
from emosteer.circuits.heads.study import described_lengths, graph_targets, ranked
from emosteer.circuits.heads.writing import logit_changes
from emosteer.circuits.validation.bank_rankings import read_contrasts
from emosteer.circuits.validation.bench import Bench, References, neutral_means, removed_by_heads
from emosteer.circuits.validation.settings import ValidateSettings
from emosteer.circuits.validation.trials import OWN, WHOLE, plan
from emosteer.circuits.validation.validate import REMOVED_ON, bench_of, cells_of, drawn, drawn_prompts
from emosteer.circuits.validation.written_replies import DECODING, edits_of, points_of, requests_of, rows_of
from emosteer.directions.directions import Directions
from emosteer.directions.extract import batch_tokens_for
from emosteer.models.model import Model
from emosteer.scenarios.scenarios import Bank, Group
from emosteer.side_effects.battery import evenly

#: Vectors whose effect on the logits a trial computes; prompts of the bank, and trials of each way of asking, that one runs.
VECTORS, PROMPTS, TRIALS = 16, 8, 16
#: Bytes of the page of a head, with its share of the texts and of the graph.
PAGE_BYTES = 20_000


def of_heads(model: Model, circuit: Circuit, directions: Directions, groups: Sequence[Group], bank: Bank, settings: HeadSettings) -> Cost:
    """Prompts that are read, edges that are patched, pages. Raises what `heads` raises of its data."""
    length, emotions = described_lengths(model, circuit, directions), len(circuit.emotions)
    strongest = [ranked(length[e]) for e in range(emotions)]
    chosen = [(e, head) for e, heads in enumerate(strongest) for head in heads[: settings.described]]
    some, labels = complete_groups(groups, bank, circuit.emotions, settings.groups)
    described = described_heads(model, directions, chosen)
    targets = graph_targets(model, directions, [heads[: settings.nodes] for heads in strongest], some[0], bank, [])
    reading = trials.measured(lambda: read(model, directions, some[:1], bank, labels, described, targets, settings.seed).texts)
    parts = [Part(f"prompts with {len(labels)} replies each", len(some), 0, times(len(some), reading and reading[0]))]
    if targets is not None and settings.checked and reading is not None:
        pairs = [Pair(a, b, 0) for b in targets.heads for a in targets.heads if a.layer < b.layer][: settings.checked // emotions]
        text = reading[1][0]
        row = text_row_of(text.ids, text.first)
        patching = trials.timed(lambda: check_text(model, directions, row, pairs, targets)) if pairs else 0.0
        parts.append(Part("edges patched", emotions * len(pairs), 0, times(emotions, patching)))
    vectors = described.direction.new_zeros(VECTORS, model.shape.d_model)
    changing = trials.timed(lambda: logit_changes(model, vectors))
    parts.append(Part("pages", len(chosen), 0, times(len(chosen) * (2 + settings.random) / VECTORS, changing)))
    n_targets, z = 0 if targets is None else len(targets.heads), model.shape.n_layers * model.shape.n_heads * model.shape.d_head
    paths = 2 * 4 * emotions * n_targets * z
    lifts = 4 * len(chosen) * (4 + settings.random) * model.shape.d_vocab
    return Cost("heads", tuple(parts), needed(model, "weights", paths + lifts), len(chosen) * PAGE_BYTES)


def of_validate(model: Model, circuit: Circuit, groups: Sequence[Group], bank: Bank, settings: ValidateSettings, kept: int = 0) -> Cost:
    """What is read before, the trials, and replies under ablation. kept: cells of trials that an earlier run has finished. Raises what
    `validate` raises of its data."""
    usable, tried, references = drawn_prompts(circuit, groups, bank, settings)
    found = _tried_bench(model, circuit, bank, usable, tried, references, settings)
    if found is None:  # not even a few prompts fit in memory
        return Cost("validate", (Part("prompts and emotions", len(tried) * len(circuit.emotions)),), needed(model, "extract"))
    bench, seconds = found
    cells = cells_of([plan(sets, circuit.emotions, settings) for sets in bench.sets], len(tried))
    rows, cost = Counter[str](), dict[str, float | None]()
    for at, some in cells.items():
        how = at[1]
        rows[how] += len(some)
        if how not in cost:
            sample = evenly(some, TRIALS)
            cost[how] = times(1 / len(sample), trials.timed(partial(bench.run, *at, sample)))
    left = 1 - min(kept, len(cells)) / len(cells)
    running = plus(*(times(left * count, cost[how]) for how, count in rows.items()))
    parts = [
        Part("prompts read before", min(settings.bank_groups, len(usable)) + len(references) + REMOVED_ON, 0, seconds),
        Part(f"trials of {len(cells)} prompts and emotions", round(left * sum(rows.values())), 0, running),
    ]
    if settings.written:
        parts.append(_under_ablation(bench))
    size = 4 * 2 * sum(rows.values()) + 4 * len(circuit.emotions) * model.shape.n_layers * model.shape.n_heads * 2
    done = f"up to {kept} of {len(cells)} prompts and emotions are kept" if kept else ""
    return Cost("validate", tuple(parts), needed(model, "extract"), size, done)


def _tried_bench(
    model: Model,
    circuit: Circuit,
    bank: Bank,
    usable: Sequence[Group],
    tried: Sequence[Group],
    references: Sequence[Group],
    settings: ValidateSettings,
) -> tuple[Bench, float] | None:
    """A bench from a few prompts, and how long reading all of them takes; None where not even they fit in memory."""
    among, longest, neurons = drawn(usable, PROMPTS), settings.reply_tokens, bool(len(circuit.neuron_index))
    tokens, instruction, some = batch_tokens_for(model), circuit.instruction, references[:1]
    contrasts = trials.measured(lambda: read_contrasts(model, among, bank, circuit.emotions, instruction, tokens))
    means = trials.measured(lambda: neutral_means(model, some, bank, instruction, neurons, longest))
    if contrasts is None or means is None:
        return None
    removed = trials.measured(lambda: removed_by_heads(model, some, bank, circuit, means[1], settings.elicitations[0], longest))
    if removed is None:
        return None
    kept = References(means[1], removed[1], contrasts[1].z.mean(0))
    seconds = min(settings.bank_groups, len(usable)) / len(among) * contrasts[0]
    seconds += len(references) * means[0] + min(REMOVED_ON, len(references)) * removed[0]
    return bench_of(model, circuit, bank, tried, contrasts[1], kept, replace(settings, bank_groups=len(among))), seconds


def _under_ablation(bench: Bench) -> Part:
    """The replies that are written while units are ablated."""
    requests, rows = requests_of(bench), rows_of(bench)
    edits = edits_of(bench, [sets.of(WHOLE, OWN) for sets, _ in rows])
    count = len(points_of(bench)) * len(rows)
    seconds = trials.writing(bench.model, None, requests, DECODING, len(rows), judged=False, edits=edits)
    return Part("replies under ablation", count, count * DECODING.max_new_tokens, times(count, seconds), at_most=True)
