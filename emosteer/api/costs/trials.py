"""Short pieces of the work itself, timed: what an estimate is made from.

Short ones are run once before they are timed, since the first pass of a shape makes room and chooses kernels. Nothing is written, no
random state is touched that a result depends on, and a trial that does not fit in memory is no error here: the work halves its batches.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from emosteer.base.cache_folder import silent
from emosteer.base.jsonl import KeyedLog
from emosteer.circuits.circuit import Circuit
from emosteer.circuits.learning import Compared, Comparisons, loss
from emosteer.circuits.precision import chosen_dtype, reader
from emosteer.circuits.settings import GainSettings
from emosteer.directions.activations import TokenRow, read_rows, read_states
from emosteer.directions.extract import Work, read_sites
from emosteer.generation.decoding import Decoding
from emosteer.generation.fluency import reply_nll
from emosteer.generation.generate import Request, generate
from emosteer.generation.steering import SteeringPlan
from emosteer.judges.choosing.chooser import Chooser
from emosteer.judges.jury import Jury
from emosteer.judges.protocol import EmotionJudge
from emosteer.models.interventions import RowEdits
from emosteer.models.memory import is_out_of_memory
from emosteer.models.model import Model
from emosteer.models.sites import ATTN_OUT, Site
from emosteer.probing import training
from emosteer.probing.reading import SHARD
from emosteer.probing.settings import ProbeSettings
from emosteer.scenarios.scenarios import Bank, Group
from emosteer.side_effects.battery import evenly

Made = TypeVar("Made")
#: Tokens that a trial of writing goes on for, beside the first two.
STEPS = 8
#: Seconds beside which what comes with a first time is little.
LONG = 1.0
#: Texts that a trial of judging reads.
TEXTS = 16


def timed(run: Callable[[], Any]) -> float | None:
    """Seconds that something takes the second time, or the first, where that is long; None where it does not fit in memory."""
    found = measured(run)
    return None if found is None else found[0]


def measured(run: Callable[[], Made]) -> tuple[float, Made] | None:
    """The same with what it made."""
    try:
        for _ in range(2):
            begin = time.perf_counter()
            made = run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds = time.perf_counter() - begin
            if seconds > LONG:
                break
        return seconds, made
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            return None
        raise


def times(count: float, seconds: float | None) -> float | None:
    """Something that takes so long, so many times."""
    return None if seconds is None else count * seconds


def plus(*seconds: float | None) -> float | None:
    """All of them; None where one is not known."""
    known = [second for second in seconds if second is not None]
    return sum(known) if len(known) == len(seconds) else None


def reading(model: Model, work: Work, packed: bool) -> float | None:
    """Seconds per token of an extraction: one batch of middle size read and summed, of those that make directions."""
    batch = work.batches[work.n_fit // 2]
    sums, sites = work.sums(model), read_sites(model)

    def one() -> None:
        sums.update(batch, read_states(model, batch, sites, packed=packed))

    return times(1 / sum(sample.cost if packed else sample.cost_alone for sample in batch), timed(one))


def reading_rows(model: Model, rows: Sequence[TokenRow], sites: Sequence[Site], budget: int) -> float | None:
    """Seconds per token of reading sequences of middle size at some sites."""
    ordered = sorted(rows, key=lambda row: len(row.ids))
    middle = ordered[len(ordered) // 2]
    some = [middle] * max(1, budget // len(middle.ids))
    return times(1 / (len(some) * len(middle.ids)), timed(lambda: read_rows(model, some, sites)))


def learning(
    model: Model, groups: Sequence[Group], bank: Bank, emotions: Sequence[str], instruction: str, settings: GainSettings
) -> float | None:
    """Seconds for one prompt of a step of learning: a pass forward and back, in the precision that learning takes."""
    data, draw = Comparisons.of(groups, bank, emotions), random.Random(settings.seed)
    by_length = sorted(data.usable, key=lambda group: sum(map(len, bank[group.key].values())))
    compared = Compared.draw(by_length[len(by_length) // 2], data, settings, draw)
    copy = reader(model, chosen_dtype(model, settings.dtype, silent))  # the stage says what it chooses
    free = torch.zeros(len(emotions), model.shape.n_layers, model.shape.d_model, device=model.device, requires_grad=True)

    def one() -> None:
        added = {Site(layer, ATTN_OUT): free[:, layer] for layer in range(model.shape.n_layers)}
        loss(copy, compared, added, instruction, settings)[0].backward()

    return timed(one)


def writing(
    model: Model,
    circuit: Circuit | None,
    requests: Sequence[Request],
    decoding: Decoding,
    size: int,
    judged: bool = True,
    edits: RowEdits | None = None,
    chooser: Chooser | None = None,
) -> float | None:
    """Seconds for each reply at its longest, in batches of a size: the prompt, some steps, and its likelihood where that is asked for; all
    candidates of it, and the choice, where it is the best of several.

    Args:
        requests: of the work, as many as there are; they are repeated to fill one batch.
        edits: of units, one row for each of the batch; chooser: who chooses.
    """
    each, decoding = decoding.best_of, decoding.drawing
    batch = [requests[number % len(requests)] for number in range(size)]
    plan = SteeringPlan(_added(model, circuit, size), size) if circuit is not None else SteeringPlan.none(size)
    few, some = (replace(decoding, max_new_tokens=min(tokens, decoding.max_new_tokens)) for tokens in (2, 2 + STEPS))
    short = timed(lambda: generate(model, batch, plan, few, row_edits=edits))
    texts: list[str] = []

    def longer() -> None:
        texts[:] = [reply.text or "." for reply in generate(model, batch, plan, some, row_edits=edits)]

    long = timed(longer)
    if short is None or long is None:
        return None
    if decoding.max_new_tokens <= few.max_new_tokens:
        return each * short / size
    step = max(0.0, long - short) / max(1, some.max_new_tokens - few.max_new_tokens)
    seconds = each * (short + step * (decoding.max_new_tokens - few.max_new_tokens))
    if chooser is not None:
        read = timed(lambda: chooser.chances([(text, text) for text in texts], [()] * size))
        seconds += times(each * decoding.max_new_tokens / some.max_new_tokens, read) or 0.0
    if judged:
        seconds += times(decoding.max_new_tokens / some.max_new_tokens, timed(lambda: reply_nll(model, texts))) or 0.0
    return seconds / size


def _added(model: Model, circuit: Circuit, size: int) -> dict[Site, torch.Tensor]:
    """What a circuit adds to every row, one emotion after the other."""
    rows = torch.arange(size) % len(circuit.emotions)
    return {
        site: (values * circuit.strength[:, None].to(values))[rows.to(values.device)] for site, values in circuit.steering(model).items()
    }


def judging(jury: Jury, texts: Sequence[str]) -> float | None:
    """Seconds for each text that the jury reads here; what endpoints are asked is not tried, since it costs money."""
    some = list(dict.fromkeys(texts))[:TEXTS]
    local = tuple(judge for judge in jury.judges if judge.key not in jury.paid)

    def one() -> None:
        with tempfile.TemporaryDirectory() as folder:
            trial = replace(jury, judges=local, kept=KeyedLog(Path(folder) / "trial.jsonl"))
            trial.readings(some, "trial")
            trial.verdicts(some, "trial")
            trial.answering([(text, text) for text in some], "trial")

    return times(1 / len(some), timed(one))


def reading_texts(judges: Sequence[EmotionJudge], check: Callable[[Sequence[str]], Any], texts: Sequence[str]) -> float | None:
    """Seconds for each text that some judges and the check of soundness read, of those that are spread evenly over the texts."""
    some = evenly(sorted(texts, key=len), TEXTS)

    def one() -> None:
        for judge in judges:
            judge.opinions(some)
        check(some)

    return times(1 / len(some), timed(one))


def fitting(n_texts: int, units: int, width: int, n_labels: int, hidden: int, settings: ProbeSettings) -> float | None:
    """Seconds for all probes of one place: those of the cross-validation, of the true labels and of shuffled ones."""
    size, draw = min(SHARD, n_texts), torch.Generator().manual_seed(0)
    states, labels = torch.randn(size, units, width, generator=draw), torch.arange(size) % n_labels
    shards = [(torch.arange(size), states)]

    def fits(n_runs: int) -> Callable[[], Any]:
        runs = training.Runs(labels.expand(n_runs, -1), torch.ones(n_runs, size), torch.full((units, n_runs), 0.1))
        return lambda: training.fit(lambda: iter(shards), runs, n_labels, hidden=hidden, epochs=2, seed=0)

    chosen, final = timed(fits(settings.folds * len(settings.decays))), timed(fits(1 + settings.shuffles))
    steps = settings.epochs * -(-n_texts // SHARD)
    return times(steps / 2, plus(chosen, final))
