"""One forward pass per group -> the states at the positions that matter. Never all activations at once.

The emotions of a group share their prompt. A group is therefore packed into one sequence, `prompt reply_1 ... reply_E`, in
which every reply sees the prompt and itself but no other reply, at the positions it would have had alone: the shared part is
computed once. Where emotions have prompts of their own (`tone`, `system`), each is a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from emosteer.base.errors import DataError
from emosteer.models.hooks import Edit
from emosteer.models.model import Model
from emosteer.models.sites import Site
from emosteer.scenarios.prompts import elicit
from emosteer.scenarios.scenarios import Group, GroupKey

Item = TypeVar("Item")


@dataclass(frozen=True)
class Sample:
    """One group as token ids. prompts: per emotion; replies: per emotion, empty where the state at t* is read; emotions: which of all
    emotions these are (their numbers, rising), empty where the group holds them all."""

    key: GroupKey
    theme: str
    prompts: tuple[tuple[int, ...], ...]
    replies: tuple[tuple[int, ...], ...]
    emotions: tuple[int, ...] = ()

    @property
    def held(self) -> tuple[int, ...]:
        """The numbers of its emotions, all of them where it lacks none."""
        return self.emotions or tuple(range(len(self.prompts)))

    @property
    def packs(self) -> bool:
        """Whether all emotions share one prompt, so that the group fits into one sequence."""
        return len(set(self.prompts)) == 1 and any(self.replies)

    @property
    def cost(self) -> int:
        """Tokens that a forward pass computes."""
        return len(self.prompts[0]) + sum(map(len, self.replies)) if self.packs else self.cost_alone

    @property
    def cost_alone(self) -> int:
        """Tokens that a forward pass computes when every emotion is a separate sequence."""
        return sum(map(len, self.prompts)) + sum(map(len, self.replies))


@dataclass(frozen=True)
class TokenRow:
    """One sequence of a batch: token ids, their positions, the segment each belongs to (0 = prompt), and for every
    state that is read the positions to average over."""

    ids: tuple[int, ...]
    positions: tuple[int, ...]
    segments: tuple[int, ...]
    reads: tuple[tuple[int, ...], ...]


def tokenize_group(
    model: Model, group: Group, elicitation: str, emotions: Sequence[str], replies: Mapping[str, str] | None, instruction: str
) -> Sample:
    """Token ids of a group under an elicitation.

    Args:
        replies: by emotion, for the `reply` elicitation; the sample holds the emotions that are there.

    Raises:
        DataError: if a prompt with its reply is longer than the model's context.
    """
    if elicitation == "reply":
        assert replies is not None
        prompt = tuple(model.prompt_ids(elicit("reply", group.text, None, instruction, group.earlier)))
        held = tuple(number for number, emotion in enumerate(emotions) if emotion in replies)
        prompts: tuple[tuple[int, ...], ...] = (prompt,) * len(held)
        written = tuple(tuple(model.text_ids(replies[emotions[number]])) for number in held)
    else:
        prompts = tuple(tuple(model.prompt_ids(elicit(elicitation, group.text, e, instruction, group.earlier))) for e in emotions)
        written, held = ((),) * len(emotions), tuple(range(len(emotions)))
    longest = max(len(p) + len(r) for p, r in zip(prompts, written, strict=True))
    if longest > model.shape.context:
        raise DataError(f"{group.key}: {longest} tokens do not fit the context of {model.name} ({model.shape.context} tokens); shorten it")
    return Sample(group.key, group.theme, prompts, written, held if len(held) < len(emotions) else ())


def read_positions(prompt: int, reply: int) -> tuple[int, ...]:
    """Positions that write a reply's tokens: the last prompt position and every reply position but the last.

    With no reply it is t*, the last prompt position alone (docs/METHOD.md section 3). Positions are absolute.
    """
    return tuple(range(prompt - 1, prompt + max(reply - 1, 0)))


def rows_of(sample: Sample, packed: bool = True) -> list[TokenRow]:
    """The sequences of a group: one that holds all emotions where they share a prompt, else one per emotion."""
    if not (packed and sample.packs):
        rows = []
        for prompt, reply in zip(sample.prompts, sample.replies, strict=True):
            size = len(prompt) + len(reply)
            rows.append(TokenRow(prompt + reply, tuple(range(size)), (0,) * size, (read_positions(len(prompt), len(reply)),)))
        return rows
    prompt = sample.prompts[0]
    ids, positions, segments, reads = list(prompt), list(range(len(prompt))), [0] * len(prompt), []
    for index, reply in enumerate(sample.replies):
        start = len(ids)
        reads.append((len(prompt) - 1, *range(start, start + len(reply) - 1)))
        ids += reply
        positions += range(len(prompt), len(prompt) + len(reply))
        segments += [index + 1] * len(reply)
    return [TokenRow(tuple(ids), tuple(positions), tuple(segments), tuple(reads))]


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows as tensors; every row reads the same number of states, and states are numbered row by row.

    ids, positions: [row, pos]; mask: additive [row, 1, pos, pos] where rows are packed, else ones and zeros [row, pos]; weights:
    [row, state of the row, pos], which averages over the read positions; first: no position before this one is read.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    weights: Tensor
    first: int = 0

    def average(self, activation: Tensor) -> Tensor:
        """[row, pos, width] -> [state, width], in float32 at least."""
        activation = activation[:, self.first :]  # the prompt is most of a short reply's row: it is not even converted
        wide = activation if activation.dtype == torch.float64 else activation.float()
        return torch.bmm(self.weights[:, :, self.first :].to(wide.dtype), wide).flatten(0, 1)

    def read_mask(self) -> Tensor:
        """[row, pos]: true at the positions that are read by any state."""
        return (self.weights > 0).any(1)


def make_batch(model: Model, rows: Sequence[TokenRow]) -> Batch:
    """Pads rows on the right and builds the mask that keeps the segments of a row apart.

    Rows of one segment get a plain padding mask instead: models take an additive mask as it is, sliding-window layers too, which
    would then see further back than their window.
    """
    size = max(len(row.ids) for row in rows)

    def padded(values: Sequence[int], fill: int) -> list[int]:
        return [*values, *[fill] * (size - len(values))]

    ids = torch.tensor([padded(row.ids, model.pad_id) for row in rows])
    positions = torch.tensor([padded(row.positions, 0) for row in rows])
    segments = torch.tensor([padded(row.segments, -1) for row in rows])
    mask = _segment_mask(segments, model.dtype) if (segments > 0).any() else (segments == 0).long()
    weights = torch.zeros(len(rows), len(rows[0].reads), size)
    for index, row in enumerate(rows):
        for state, where in enumerate(row.reads):
            weights[index, state, list(where)] = 1 / len(where)
    device = model.device
    first = min(position for row in rows for where in row.reads for position in where)
    return Batch(ids.to(device), positions.to(device), mask.to(device), weights.to(device), first)


def _segment_mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask [row, 1, pos, pos]: a token sees the prompt and its own segment, up to itself."""
    size = segments.shape[1]
    same = (segments[:, None, :] == segments[:, :, None]) | (segments[:, None, :] == 0)
    visible = same & torch.ones(size, size, dtype=torch.bool).tril()
    return torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)[:, None]


def read_states(
    model: Model,
    samples: Sequence[Sample],
    sites: Sequence[Site],
    *,
    packed: bool = True,
    edits: Mapping[Site, Edit] | None = None,
    bridge: bool = False,
) -> dict[Site, Tensor]:
    """States of whole groups in one forward pass.

    Args:
        samples: groups that hold equally many emotions.
        sites: where to read.
        packed: share each group's prompt (the fast path); False computes every emotion's sequence on its own (the simple path).
        edits: changes on the way, at any site; they see the rows as they are computed. A site is read behind its own edit.
        bridge: run on the TransformerBridge; the plain model has the same sites and is faster (fused attention, fewer modules).

    Returns:
        site -> [group, emotion, width], averaged over the read positions, float32.
    """
    n_emotions = len(samples[0].prompts)
    fits = packed and not _slides(model, samples)
    rows = [row for sample in samples for row in rows_of(sample, fits and all(s.packs for s in samples))]
    states = read_rows(model, rows, sites, edits=edits, bridge=bridge)
    return {site: state.unflatten(0, (len(samples), n_emotions)) for site, state in states.items()}


def read_rows(
    model: Model, rows: Sequence[TokenRow], sites: Sequence[Site], *, edits: Mapping[Site, Edit] | None = None, bridge: bool = False
) -> dict[Site, Tensor]:
    """States of sequences in one forward pass; arguments as for `read_states`.

    Args:
        rows: sequences that read equally many states each.

    Returns:
        site -> [state, width], states numbered row by row, averaged over the read positions, float32.
    """
    batch = make_batch(model, rows)
    # The states outlive the pass. Put where they arise, each would lie in the space that a layer's activations have just left, which the
    # next layer's would no longer fit into: the heap would grow layer by layer. So room for all is taken first.
    dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
    n_states = len(rows) * len(rows[0].reads)
    rooms = {site: torch.empty(n_states, model.width(site.kind), dtype=dtype, device=model.device) for site in sites}
    states: dict[Site, Tensor] = {}
    hooks: dict[Site, Edit] = dict(edits or {})
    for site, room in rooms.items():
        hooks[site] = _averaging(states, site, room, batch, hooks.get(site))
    with torch.no_grad():
        model.run(batch.ids, hooks, attention_mask=batch.mask, position_ids=batch.positions, bridge=bridge)
    return states


def _averaging(states: dict[Site, Tensor], site: Site, room: Tensor, batch: Batch, edit: Edit | None) -> Edit:
    def hook(activation: Tensor) -> Tensor | None:
        new = edit(activation) if edit else None
        states[site] = room.copy_(batch.average(activation if new is None else new))
        return new

    return hook


def _slides(model: Model, samples: Sequence[Sample]) -> bool:
    """Sliding-window layers count distance in the sequence, not in positions: long packed groups would be cut differently."""
    window = model.window
    return window is not None and any(sample.cost >= window for sample in samples)


def batches_by_cost(samples: Iterable[Sample], budget: int, packed: bool = True) -> list[list[Sample]]:
    """Batches of whole groups with at most `budget` tokens each (one group at least), similar lengths together.

    Deterministic: ties keep their order. A batch's cost counts its padding; `packed` as for `read_states`.
    """
    return batches_by(samples, lambda sample: sample.cost if packed else sample.cost_alone, budget)


def batches_by(items: Iterable[Item], cost: Callable[[Item], int], budget: int) -> list[list[Item]]:
    """As `batches_by_cost`, of anything with a cost in tokens."""
    batches: list[list[Item]] = []
    widest = 0
    for item in sorted(items, key=lambda item: -cost(item)):
        if batches and (len(batches[-1]) + 1) * widest <= budget:
            batches[-1].append(item)
        else:
            batches.append([item])
            widest = cost(item)
    return batches
