"""How much memory a stage takes, by the arithmetic of docs/SCALING.md. No torch at import."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from emosteer.directions.settings import Settings
from emosteer.scenarios.emotions import EMOTIONS
from emosteer.writing.settings import BATCH_SIZE

if TYPE_CHECKING:
    from emosteer.models.model import Model

#: The stage that writes, as `memory_of` names it.
WRITING = f"generate, {BATCH_SIZE} guided replies at once"
#: Tokens of a prompt with its reply, and of a step of learning, that memory is reckoned for.
REPLY_TOKENS, STEP_TOKENS = 192, 640
#: Strata of an extraction beside its themes, and themes at most (`directions.contrast`).
STRATA = 20


def memory_of(model: Model) -> dict[str, int]:
    """About how many bytes a stage takes with the default settings, the weights included (docs/SCALING.md)."""
    from emosteer.generation.kv_cache import position_bytes

    shape, size = model.shape, model.dtype.itemsize
    weights = sum(weight.nbytes for weight in {id(weight): weight for weight in model.hf.parameters()}.values())
    units, emotions = shape.n_heads * shape.d_head + shape.d_mlp, len(EMOTIONS)
    per_token = 8 * shape.d_model + 3 * shape.d_mlp + 2 * shape.n_heads * shape.d_head  # one layer's activations
    statistics = 16 * (STRATA * emotions * 2 * shape.n_layers * shape.d_model + 2 * emotions * shape.n_layers * units)
    kept = STEP_TOKENS * (shape.n_layers * 2 * per_token * size + shape.d_vocab * (size + 8))  # what a backward pass needs
    cache = position_bytes(shape, model.dtype) * REPLY_TOKENS
    return {
        "weights": weights,
        "extract": weights + statistics + Settings.batch_tokens * per_token * size,
        "circuit": weights + kept + 3 * 4 * emotions * shape.n_layers * shape.n_heads * shape.d_head,
        WRITING: weights + 2 * BATCH_SIZE * cache,
    }


def needed(model: Model, stage: str, more: int = 0) -> int:
    """Bytes that a stage will take, as the machine sees them: on a CPU at least what the process has had by now, with its libraries, the
    loading and a trial of the work. Called after the trial.

    Args:
        stage: as `memory_of` names it; more: what comes on top of it, and is not in the trial.
    """
    reckoned = memory_of(model)[stage]
    return more + (max(reckoned, peak()) if model.device.type == "cpu" else reckoned)


def peak() -> int:
    """The most bytes of memory that this process has had, 0 where nobody can tell. On Linux /proc is asked first: the other figure counts
    what the parent held when the process was started."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
