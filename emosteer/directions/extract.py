"""The stage `extract`: scenarios and an elicitation -> Directions. Interruptible at any moment; a rerun resumes.

Several processes may share the batches (see `workers`): each sums those that it claims and keeps the sums in its own file, and process 0
merges the files. Sums are kept so precisely (see `contrast`) that the result is the same, whoever added what.
"""

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

from emosteer.base import artifacts
from emosteer.base.artifacts import Provenance
from emosteer.base.errors import ArtifactError, DataError, DegenerateDirection, EmosteerError
from emosteer.base.files import sha256_text
from emosteer.base.processes import ALONE, Crew, part, parts
from emosteer.base.progress import bar, note
from emosteer.directions.activations import Sample, batches_by_cost, read_states, tokenize_group
from emosteer.directions.contrast import Contrasts, Plan, as_json, make_plan, unlinked
from emosteer.directions.directions import Directions, from_contrasts
from emosteer.directions.settings import GPU_TOKENS, Settings
from emosteer.models.memory import halve_on_oom, release_memory
from emosteer.models.model import Model
from emosteer.models.sites import MLP_POST, Site, Z, residual_sites
from emosteer.scenarios.scenarios import NEUTRAL, Bank, Group, replies_of

CHECKPOINT = "extract-checkpoint"
#: Seconds between checkpoints; stretched where writing one takes long, so that saving costs a few percent at most.
CHECKPOINT_SECONDS = 4.0


def batch_tokens_for(model: Model) -> int:
    """Tokens per forward pass where nobody says how many."""
    return Settings.batch_tokens if model.device.type == "cpu" else GPU_TOKENS


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
    crew: Crew = ALONE,
) -> Directions:
    """Extracts directions for every residual site and contrast statistics for every head and neuron.

    Args:
        bank: replies by group and emotion; needed by the `reply` elicitation.
        data: file name -> sha256, for the provenance.
        checkpoint: where progress is kept; a rerun with the same settings goes on from it. It stays when this returns: call
            `finish_checkpoint` once the directions are saved, so that a process that dies in between loses nothing.
        fresh: start over even if there is a checkpoint.
        on_batch: called with the number of batches done by this process, earlier runs included (for tests).
        crew: the processes that share the work; they need a checkpoint on a disk that all see.

    Raises:
        ShareDone: in every process but the first, once its share is on disk.
        DataError: if an emotion has no reply, or no group compares it with others. DegenerateDirection: if the data do not tell the
            emotions apart.
    """
    work = work_of(model, groups, settings, bank)
    plan, batches, contrasts = work.plan, work.batches, work.sums(model)
    share = Share(contrasts, checkpoint, work.fingerprint, crew)
    share.resume(fresh, batches)
    for todo in (range(work.n_fit), range(work.n_fit, len(batches))):
        mine = [index for index in todo if index not in share.known]
        if mine and todo.start and not crew.alone:
            share.exchange()  # held-out groups are read with the directions of all others, whoever summed those
        _run(model, batches, share, mine, settings, on_batch)
    share.collect(len(batches))
    contrasts.settle()
    provenance = Provenance(
        model=model.name,
        model_sha256=model.sha256,
        template_sha256=model.template_sha256,
        method=f"difference of means, {settings.elicitation} elicitation",
        params={**_plain(settings), "dtype": model.precision.removeprefix("torch."), "device": model.device.type, "plan": as_json(plan)},
        seed=settings.seed,
        data=data or {},
        versions=artifacts.versions(),
    )
    return from_contrasts(
        contrasts,
        elicitation=settings.elicitation,
        instruction=settings.instruction,
        dropped=work.dropped,
        provenance=provenance,
        incomplete=sum(bool(sample.emotions) for sample in work.samples),
    )


@dataclass(frozen=True, eq=False)
class Work:
    """What an extraction reads. batches: of groups, the first `n_fit` of which make directions; fingerprint: of everything that its
    progress depends on."""

    samples: list[Sample]
    dropped: dict[str, int]
    plan: Plan
    batches: list[list[Sample]]
    n_fit: int
    fingerprint: str

    def sums(self, model: Model) -> Contrasts:
        """Sums of nothing yet."""
        shape = model.shape
        return Contrasts(self.plan, shape.n_layers, shape.d_model, shape.n_heads * shape.d_head, shape.d_mlp, model.device)

    def kept(self, checkpoint: Path) -> set[int]:
        """Numbers of the batches that earlier runs left on disk."""
        rows = (artifacts.load_fields(path, CHECKPOINT) or {} for path in parts(checkpoint).values())
        return {number for row in rows if row.get("fingerprint") == self.fingerprint for number in row.get("batches", [])}


def work_of(model: Model, groups: Sequence[Group], settings: Settings, bank: Bank | None) -> Work:
    """What an extraction with these settings reads.

    Raises:
        DataError, DegenerateDirection: as `extract`.
    """
    samples, dropped = _samples(model, groups, settings, bank)
    plan = make_plan([(s.key.scenario, s.theme) for s in samples], settings.emotions, settings.holdout, settings.seed)
    batches, n_fit = _ordered(samples, plan, settings)
    return Work(samples, dropped, plan, batches, n_fit, _fingerprint(model, samples, settings, plan))


def read_sites(model: Model) -> list[Site]:
    """Where an extraction reads."""
    return [*residual_sites(model.shape.n_layers), *(Site(layer, kind) for layer in range(model.shape.n_layers) for kind in (Z, MLP_POST))]


def finish_checkpoint(checkpoint: Path) -> None:
    """Removes the progress of an extraction whose result has been saved, all processes' parts; does nothing where there is none.

    Raises:
        EmosteerError: if it cannot be removed.
    """
    for path in {checkpoint, *parts(checkpoint).values()}:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise EmosteerError(f"cannot remove the finished checkpoint {path}: {error.strerror or error}; remove it by hand") from error


def _samples(model: Model, groups: Sequence[Group], settings: Settings, bank: Bank | None) -> tuple[list[Sample], dict[str, int]]:
    """Token ids of every group that compares two emotions or more; what was dropped is counted by reason."""
    dropped: Counter[str] = Counter()
    samples = []
    for group in groups:
        replies = None
        if settings.elicitation == "reply":
            replies = replies_of(bank, group, settings.emotions)
            if len(replies) < min(2, len(settings.emotions)):
                dropped["a reply in one emotion alone" if replies else "no reply in the bank"] += 1
                continue
        samples.append(tokenize_group(model, group, settings.elicitation, settings.emotions, replies, settings.instruction))
    if settings.elicitation == "reply":
        _require_compared(groups, samples, settings.emotions, bank or {})
    if all(len(set(zip(s.prompts, s.replies, strict=True))) == 1 for s in samples):
        # Found here and not by the norm: rounding in a packed pass would leave a tiny contrast, and scale it up to a direction.
        raise DegenerateDirection(
            "the emotions of every group have the same tokens, so that nothing tells them apart; check the replies or the prompts"
        )
    return samples, dict(dropped)


def _require_compared(groups: Sequence[Group], samples: Sequence[Sample], emotions: Sequence[str], bank: Bank) -> None:
    """Refuses data in which an emotion has no reply, or stands beside no other.

    Raises:
        DataError: saying what the bank lacks and what it holds.
    """
    there = Counter(emotion for group in groups for emotion in bank.get(group.key, {}) if emotion != NEUTRAL)
    if not there:
        raise DataError(
            f"none of the {len(groups)} scenario-events has a reply in the bank; check that its skeleton_id and valence fit the scenarios"
        )
    if lacking := [emotion for emotion in emotions if not there[emotion]]:
        held = ", ".join(f"{emotion} ({count})" for emotion, count in there.most_common())
        raise DataError(
            f"no reply in {', '.join(lacking)}: the bank's replies to these events are in {held}; choose among these with --emotions"
        )
    compared = torch.zeros(len(emotions), len(emotions), dtype=torch.bool)
    for sample in samples:
        compared[torch.tensor(sample.held)[:, None], torch.tensor(sample.held)] = True
    if apart := unlinked(compared):
        raise DataError(
            f"no scenario-event has a reply in {', '.join(emotions[number] for number in apart)} beside one in the other emotions, so that "
            "there is nothing to compare; have all emotions answer the same scenario-events"
        )


def _ordered(samples: Sequence[Sample], plan: Plan, settings: Settings) -> tuple[list[list[Sample]], int]:
    """Batches: all groups that make directions first, the held-out ones after, so that one pass is enough; how many come first."""
    fit = [s for s in samples if s.key.scenario not in plan.heldout]
    held = [s for s in samples if s.key.scenario in plan.heldout]
    first = _batched(fit, settings)
    return first + _batched(held, settings), len(first)


def _batched(samples: Sequence[Sample], settings: Settings) -> list[list[Sample]]:
    """Batches of groups that hold equally many emotions, complete ones first."""
    sizes = sorted({len(sample.held) for sample in samples}, reverse=True)
    alike = ([sample for sample in samples if len(sample.held) == size] for size in sizes)
    return [batch for some in alike for batch in batches_by_cost(some, settings.batch_tokens, settings.packed)]


def _run(
    model: Model,
    batches: list[list[Sample]],
    share: Share,
    todo: Sequence[int],
    settings: Settings,
    on_batch: Callable[[int], None] | None,
) -> None:
    """Claims and sums batches until none is left. todo: the batches' numbers."""
    sites = read_sites(model)

    def compute(samples: list[Sample]) -> tuple[list[Sample], dict[Site, Tensor]]:
        return samples, read_states(model, samples, sites, packed=settings.packed)

    total, left = sum(map(len, batches)), sum(len(batches[i]) for i in todo)
    with bar("extract (groups)", total, total - left) as advance:
        for index in share.crew.claim(todo):
            for samples, states in halve_on_oom(batches[index], compute, note):
                share.contrasts.update(samples, states)
            share.done.add(index)
            advance(len(batches[index]) * share.crew.world)  # the others are about as fast
            release_memory()
            if len(share.done) < len(batches):
                share.save_now_and_then()
            if on_batch:
                on_batch(len(share.done))


class Share:
    """One process's part of the work. done: numbers of the batches in its sums; known: of those that any process had when it began."""

    def __init__(self, contrasts: Contrasts, checkpoint: Path | None, fingerprint: str, crew: Crew) -> None:
        """checkpoint: where process 0 keeps its part; the others' are beside it."""
        if checkpoint is None and not crew.alone:
            raise ValueError("several processes need a checkpoint to meet at")
        self.contrasts, self.fingerprint, self.crew, self.checkpoint = contrasts, fingerprint, crew, checkpoint
        self.file = None if checkpoint is None else part(checkpoint, crew.rank)
        self.done: set[int] = set()
        self.known: set[int] = set()
        self._saved, self._pause = time.monotonic(), CHECKPOINT_SECONDS

    def save_now_and_then(self) -> None:
        """Writes the part if the last time is long enough ago."""
        if self.file is not None and time.monotonic() - self._saved >= self._pause:
            start = time.monotonic()
            self.save()
            self._saved = time.monotonic()
            self._pause = max(CHECKPOINT_SECONDS, 20 * (self._saved - start))

    def save(self) -> None:
        """Writes the part."""
        if self.file is not None:
            _write_checkpoint(self.file, self.fingerprint, self.contrasts, sorted(self.done))

    def resume(self, fresh: bool, batches: Sequence[Sequence[Sample]]) -> None:
        """Resumes from the parts on disk. Process 0 takes over those of processes that no longer exist."""
        if self.checkpoint is None:
            return
        total = sum(map(len, batches))
        self.crew.kept = lambda: f"{self._kept(batches)} of {total} scenario-events are kept in {self.checkpoint}*"
        if fresh and self.crew.lead:
            finish_checkpoint(self.checkpoint)
        self.crew.meet()
        assert self.file is not None
        if saved := self._read(self.file):
            self.contrasts.restore(saved.tensors)
            self.done = set(saved.fields["batches"])
        orphans = [path for number, path in parts(self.checkpoint).items() if number >= self.crew.world]
        if self.crew.lead and orphans:
            self._adopt(orphans)
        self.crew.meet()
        shares = [self._batches(path) for path in parts(self.checkpoint).values()]
        self.known = set().union(*shares)
        if len(self.known) < sum(map(len, shares)):
            raise ArtifactError(f"{self.checkpoint} and its parts hold some batches twice; start over with --fresh")
        self.crew.meet()  # nobody writes before all have read
        if self.known:
            note(f"going on after {sum(len(batches[i]) for i in self.known)} groups")

    def exchange(self) -> None:
        """Waits until all processes have summed their groups, and makes the directions that held-out groups are read with."""
        self.save()
        self.crew.meet()
        assert self.checkpoint is not None
        whole = Contrasts(*self.contrasts.sizes)
        for path in parts(self.checkpoint).values():
            whole.merge(self._loaded(path).tensors)
        self.contrasts.readers = whole.references()
        self.crew.meet()  # nobody writes before all have read

    def collect(self, n_batches: int) -> None:
        """Ends the shared work: process 0 merges all parts into its own sums.

        Raises:
            ShareDone: in every other process. EmosteerError: if the parts are not whole.
        """
        if self.crew.alone:
            return
        self.save()
        self.crew.finish()
        assert self.checkpoint is not None
        have = set(self.done)
        for number, path in parts(self.checkpoint).items():
            if number:
                saved = self._loaded(path)
                self.contrasts.merge(saved.tensors)
                have |= set(saved.fields["batches"])
        if len(have) != n_batches:
            raise EmosteerError(
                f"expected {n_batches} batches in {self.checkpoint} and its parts, found {len(have)}: do all processes see the same disk? "
                "The same command goes on"
            )

    def _adopt(self, orphans: Sequence[Path]) -> None:
        for path in orphans:
            saved = self._read(path)
            batches = set(saved.fields["batches"]) if saved else set()
            if saved and not batches & self.done:
                self.contrasts.merge(saved.tensors)
                self.done |= batches
        self.save()
        for path in orphans:  # a process that dies before this finds them in its own part, and drops them
            path.unlink(missing_ok=True)

    def _read(self, path: Path) -> artifacts.Artifact | None:
        """A part of this very extraction; None, with a note, if it is missing or belongs to another."""
        if not path.exists():
            return None
        try:
            saved = artifacts.load(path, CHECKPOINT)
        except ArtifactError as error:
            note(f"starting over: {error}")
            return None
        if saved.fields.get("fingerprint") != self.fingerprint or "batches" not in saved.fields:
            note(f"starting over: {path} is from other settings, data or weights")
            return None
        return saved

    def _loaded(self, path: Path) -> artifacts.Artifact:
        """A part that must be there."""
        saved = artifacts.load(path, CHECKPOINT)
        if saved.fields.get("fingerprint") != self.fingerprint:
            raise ArtifactError(f"{path} was changed by another run; run one command per artefact, then this one again")
        return saved

    def _batches(self, path: Path) -> list[int]:
        fields = artifacts.load_fields(path, CHECKPOINT) or {}
        return list(fields.get("batches", [])) if fields.get("fingerprint") == self.fingerprint else []

    def _kept(self, batches: Sequence[Sequence[Sample]]) -> int:
        files = parts(self.checkpoint).values() if self.checkpoint else ()
        return sum(len(batches[i]) for path in files for i in self._batches(path))


def _plain(settings: Settings) -> dict[str, Any]:
    return {**asdict(settings), "emotions": list(settings.emotions)}


def _fingerprint(model: Model, samples: Sequence[Sample], settings: Settings, plan: Plan) -> str:
    """Everything that a checkpoint depends on, hashed: settings, weights, and every token."""
    tokens = [[str(s.key), s.theme, s.prompts, s.replies, s.held] for s in samples]
    return sha256_text(json.dumps([_plain(settings), as_json(plan), model.sha256, model.precision, torch.__version__, tokens]))


def _write_checkpoint(path: Path, fingerprint: str, contrasts: Contrasts, batches: Sequence[int]) -> None:
    blank = Provenance(model="", model_sha256="", template_sha256="", method=CHECKPOINT)
    artifacts.save(path, CHECKPOINT, {"fingerprint": fingerprint, "batches": list(batches)}, contrasts.state(), blank)
