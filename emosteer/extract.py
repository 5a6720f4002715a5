"""The stage `extract`: scenarios and an elicitation -> Directions. Interruptible at any moment; a rerun goes on."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emosteer import artifacts
from emosteer.activations import Sample, batches_by_cost, halve_on_oom, read_states, tokenize_group
from emosteer.artifacts import Provenance
from emosteer.contrast import Contrasts, Plan, as_json, make_plan
from emosteer.devices import release_memory
from emosteer.directions import Directions, from_contrasts
from emosteer.errors import ArtifactError, DataError, DegenerateDirection, EmosteerError
from emosteer.files import sha256_text
from emosteer.model import Model
from emosteer.progress import bar, note
from emosteer.prompts import INSTRUCTION
from emosteer.scenarios import Bank, Group
from emosteer.sites import MLP_POST, Site, Z, residual_sites

CHECKPOINT = "extract-checkpoint"
#: Seconds between checkpoints; stretched where writing one takes long, so that saving costs a few percent at most.
CHECKPOINT_SECONDS = 4.0
#: Batches between returns of freed memory to the system.
TRIM_EVERY = 2


@dataclass(frozen=True)
class Settings:
    """What shapes the result of an extraction."""

    emotions: tuple[str, ...]
    elicitation: str = "reply"
    instruction: str = INSTRUCTION
    holdout: float = 0.1
    seed: int = 0
    batch_tokens: int = 1024
    packed: bool = True


def extract(
    model: Model,
    groups: Sequence[Group],
    settings: Settings,
    *,
    bank: Bank | None = None,
    data: dict[str, str] | None = None,
    checkpoint: Path | None = None,
    fresh: bool = False,
    on_batch: Callable[[int], None] | None = None,
) -> Directions:
    """Extracts directions for every residual site and contrast statistics for every head and neuron.

    Args:
        bank: replies by group and emotion; needed by the `reply` elicitation.
        data: file name -> sha256, for the provenance.
        checkpoint: where progress is kept; a rerun with the same settings goes on from it. It stays when this returns: call
            `finish_checkpoint` once the directions are saved, so that a process that dies in between loses nothing.
        fresh: start over even if there is a checkpoint.
        on_batch: called with the number of batches done (for tests).

    Raises:
        DataError: if no group is complete. DegenerateDirection: if the data do not tell the emotions apart.
    """
    samples, dropped = _samples(model, groups, settings, bank)
    plan = make_plan([(s.key.scenario, s.theme) for s in samples], settings.emotions, settings.holdout, settings.seed)
    batches = _ordered(samples, plan, settings)
    shape = model.shape
    contrasts = Contrasts(plan, shape.n_layers, shape.d_model, shape.n_heads * shape.d_head, shape.d_mlp)
    fingerprint = _fingerprint(model, samples, settings, plan)
    done = 0 if fresh or checkpoint is None else _resume(checkpoint, fingerprint, contrasts)
    _run(model, batches, contrasts, settings, done, checkpoint, fingerprint, on_batch)
    provenance = Provenance(
        model=model.name,
        model_sha256=model.sha256,
        template_sha256=model.template_sha256,
        method=f"difference of means, {settings.elicitation} elicitation",
        params={**_plain(settings), "dtype": str(model.dtype).removeprefix("torch."), "device": model.device.type, "plan": as_json(plan)},
        seed=settings.seed,
        data=data or {},
        versions=artifacts.versions(),
    )
    return from_contrasts(
        contrasts, elicitation=settings.elicitation, instruction=settings.instruction, dropped=dropped, provenance=provenance
    )


def finish_checkpoint(checkpoint: Path) -> None:
    """Removes the progress of an extraction whose result has been saved; does nothing where there is none.

    Raises:
        EmosteerError: if it cannot be removed.
    """
    try:
        checkpoint.unlink(missing_ok=True)
    except OSError as error:
        raise EmosteerError(f"cannot remove the finished checkpoint {checkpoint}: {error.strerror or error}; remove it by hand") from error


def _samples(model: Model, groups: Sequence[Group], settings: Settings, bank: Bank | None) -> tuple[list[Sample], dict[str, int]]:
    """Token ids of every complete group; what was dropped is counted by reason."""
    dropped: Counter[str] = Counter()
    samples = []
    for group in groups:
        replies = None
        if settings.elicitation == "reply":
            replies = (bank or {}).get(group.key, {})
            missing = [emotion for emotion in settings.emotions if emotion not in replies]
            if missing:
                dropped["no reply in the bank" if len(missing) == len(settings.emotions) else "some emotions have no reply"] += 1
                continue
        samples.append(tokenize_group(model, group, settings.elicitation, settings.emotions, replies, settings.instruction))
    if not samples:
        raise DataError(
            f"none of the {len(groups)} scenario-events has a reply for every emotion ({', '.join(settings.emotions)}); "
            "check that the bank's skeleton_id and valence fit the scenarios"
        )
    if all(len(set(zip(s.prompts, s.replies, strict=True))) == 1 for s in samples):
        # Found here and not by the norm: rounding in a packed pass would leave a tiny contrast, and scale it up to a direction.
        raise DegenerateDirection(
            "the emotions of every group have the same tokens, so that nothing tells them apart; check the replies or the prompts"
        )
    return samples, dict(dropped)


def _ordered(samples: Sequence[Sample], plan: Plan, settings: Settings) -> list[list[Sample]]:
    """Batches: all groups that make directions first, the held-out ones after, so that one pass is enough."""
    fit = [s for s in samples if s.key.scenario not in plan.heldout]
    held = [s for s in samples if s.key.scenario in plan.heldout]
    return batches_by_cost(fit, settings.batch_tokens, settings.packed) + batches_by_cost(held, settings.batch_tokens, settings.packed)


def _run(
    model: Model,
    batches: list[list[Sample]],
    contrasts: Contrasts,
    settings: Settings,
    done: int,
    checkpoint: Path | None,
    fingerprint: str,
    on_batch: Callable[[int], None] | None,
) -> None:
    sites = [*residual_sites(model.shape.n_layers), *(Site(layer, kind) for layer in range(model.shape.n_layers) for kind in (Z, MLP_POST))]

    def compute(samples: list[Sample]) -> tuple[list[Sample], dict[Site, Tensor]]:
        return samples, read_states(model, samples, sites, packed=settings.packed)

    saved, pause = time.monotonic(), CHECKPOINT_SECONDS
    total = sum(map(len, batches))
    with bar("extract (groups)", total, sum(map(len, batches[:done]))) as advance:
        for index in range(done, len(batches)):
            for samples, states in halve_on_oom(batches[index], compute, note):
                contrasts.update(samples, states)
            advance(len(batches[index]))
            if index % TRIM_EVERY == 0:
                release_memory()
            if checkpoint is not None and time.monotonic() - saved >= pause and index + 1 < len(batches):
                start = time.monotonic()
                _write_checkpoint(checkpoint, fingerprint, contrasts, index + 1)
                saved = time.monotonic()
                pause = max(CHECKPOINT_SECONDS, 20 * (saved - start))
            if on_batch:
                on_batch(index + 1)


def _plain(settings: Settings) -> dict[str, Any]:
    return {**asdict(settings), "emotions": list(settings.emotions)}


def _fingerprint(model: Model, samples: Sequence[Sample], settings: Settings, plan: Plan) -> str:
    """Everything that a checkpoint depends on, hashed: settings, weights, and every token."""
    tokens = [[str(s.key), s.theme, s.prompts, s.replies] for s in samples]
    return sha256_text(json.dumps([_plain(settings), as_json(plan), model.sha256, str(model.dtype), torch.__version__, tokens]))


def _write_checkpoint(path: Path, fingerprint: str, contrasts: Contrasts, done: int) -> None:
    blank = Provenance(model="", model_sha256="", template_sha256="", method=CHECKPOINT)
    artifacts.save(path, CHECKPOINT, {"fingerprint": fingerprint, "done": done}, contrasts.state(), blank)


def _resume(path: Path, fingerprint: str, contrasts: Contrasts) -> int:
    """Restores a checkpoint of this very extraction; returns the number of batches done."""
    if not path.exists():
        return 0
    try:
        found = artifacts.load(path, CHECKPOINT)
    except ArtifactError as error:
        note(f"starting over: {error}")
        return 0
    if found.fields.get("fingerprint") != fingerprint:
        note(f"starting over: {path} is from other settings, data or weights")
        return 0
    contrasts.restore(found.tensors)
    note(f"going on after {contrasts.n_groups} groups")
    return int(found.fields["done"])
