"""The default strength of a circuit, found without a judge: as strong as the text bears.

On training prompts the circuit writes at rising strengths, and the unsteered model says how likely each reply is by itself. Good
steered replies are about as likely as unsteered ones; when steering breaks the text they become unlikely, and fast. The strength
taken is the largest before that: its mean nats per token lie at most `tolerance` above the lowest of any weaker strength, the
unsteered replies included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from emosteer.base.errors import DataError
from emosteer.base.progress import bar
from emosteer.calibration.settings import TuneSettings
from emosteer.circuits.circuit import Circuit
from emosteer.circuits.methods import CIRCUIT, METHODS, NONE, RESIDUAL
from emosteer.generation.decoding import Decoding
from emosteer.generation.fluency import reply_nll
from emosteer.models.model import Model
from emosteer.scenarios.scenarios import Group
from emosteer.scenarios.splits import stable_share
from emosteer.writing.jobs import Job
from emosteer.writing.writer import Writer


def strongest(costs: dict[float, float], tolerance: float) -> float:
    """The largest strength reached before the cost rises by more than `tolerance` above the lowest so far.

    Args:
        costs: strength -> mean nats per token, in rising order of strength, 0 (unsteered) first.
    """
    lowest, best = float("inf"), 0.0
    for strength, cost in costs.items():
        if strength and not cost <= lowest + tolerance:
            break
        lowest, best = min(lowest, cost), strength
    return best


def tune_strength(model: Model, circuit: Circuit, groups: Sequence[Group], settings: TuneSettings) -> Circuit:
    """The circuit with its tuned default strength (the same for all emotions), for circuit and residual steering.

    Learned outputs keep theirs: they write in the bank's tone, whose words are less predictable than the model's own at any strength, so
    that this rule would always take the weakest.

    The measured curves are kept in the circuit's metrics under "tuning". Where even the weakest strength costs too much, that one is
    taken.

    Raises:
        DataError: if there is no scenario-event.
    """
    if not groups:
        raise DataError("no scenario-event to tune the strength on; check the scenario file")
    chosen = sorted(groups, key=lambda group: stable_share(f"tune/{group.key}", settings.seed))[: settings.n_prompts]
    grids = {RESIDUAL: settings.residual_strengths}
    if not circuit.learned_outputs:
        grids = {CIRCUIT: settings.learned_strengths if circuit.learned_gains else settings.strengths, **grids}
    curves: dict[str, dict[float, float]] = {}
    with bar("tuning strength (points)", 1 + sum(map(len, grids.values()))) as advance:
        unsteered = _cost(model, circuit, chosen, NONE, 0.0, settings)
        advance(1)
        for method, strengths in grids.items():
            curves[method] = {0.0: unsteered}
            for strength in strengths:
                curves[method][strength] = _cost(model, circuit, chosen, method, strength, settings)
                advance(1)
    best = {method: strongest(curve, settings.tolerance) or grids[method][0] for method, curve in curves.items()}
    rule = f"largest before nats per token rise by more than {settings.tolerance} ({len(chosen)} prompts)"
    tuning = {"rule": rule, **{method: {str(strength): cost for strength, cost in curve.items()} for method, curve in curves.items()}}
    kept = circuit.strength.tolist()
    tuned = circuit.with_strength([best[CIRCUIT]] * len(kept) if CIRCUIT in best else kept, best[RESIDUAL])
    return replace(tuned, metrics={**circuit.metrics, "tuning": tuning})


def _cost(model: Model, circuit: Circuit, groups: Sequence[Group], method: str, strength: float, settings: TuneSettings) -> float:
    """Mean nats per token of the replies at a strength; an empty reply counts as broken (10 nats)."""
    steers = METHODS[method].steers
    emotions = circuit.emotions if steers else (NONE,)
    jobs = [Job.of(group, emotion, method, strength) for group in groups for emotion in emotions]
    decoding = Decoding(max_new_tokens=settings.max_new_tokens, seed=settings.seed)
    writer = Writer(model, circuit if steers else None, decoding, circuit.instruction, method, settings.batch_size)
    costs = [cost if cost == cost else 10.0 for cost in reply_nll(model, [reply.text for _, reply in writer.write(jobs)])]
    return sum(costs) / len(costs)
