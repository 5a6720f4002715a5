"""Perplexity of neutral text under steering: replies that are there are read, token by token, by the model as it would write them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from emosteer.base.files import sha256_text
from emosteer.base.jsonl import KeyedLog
from emosteer.base.progress import bar
from emosteer.generation.steering import SteeringPlan
from emosteer.models.hooks import Edit
from emosteer.models.model import Model
from emosteer.models.sites import Site
from emosteer.writing.contest_writer import Cell, ContestWriter

#: Texts read at once.
BATCH = 24


@torch.no_grad()
def text_nll(model: Model, prompts: Sequence[Sequence[int]], replies: Sequence[Sequence[int]], plan: SteeringPlan | None) -> list[float]:
    """Mean nats per token of replies to prompts, under steering that acts where it would if they were being written: at the prompt's last
    position and at every later one.

    Args:
        prompts, replies: token ids, none of them empty; plan: one row per text, of the kind that acts on the reply; None is no steering.
    """
    rows = [[*prompt, *reply] for prompt, reply in zip(prompts, replies, strict=True)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [model.pad_id] * (width - len(row)) for row in rows], device=model.device)
    starts = torch.tensor([len(prompt) - 1 for prompt in prompts], device=model.device)
    acts = torch.arange(width, device=model.device) >= starts[:, None]
    edits = {} if plan is None else _edits(plan.to(model.device, model.dtype), acts)
    hidden = model.run(ids, edits, bridge=False)  # padded on the right and causal: the padding is never seen
    found = []
    for row, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        begin, end = len(prompt) - 1, len(prompt) + len(reply) - 1
        logits = model.logits(hidden[row, begin:end]).float()
        found.append(cross_entropy(logits, ids[row, begin + 1 : end + 1]).item())
    return found


def _edits(plan: SteeringPlan, acts: Tensor) -> Mapping[Site, Edit]:
    def adding(value: Tensor) -> Edit:
        shift = value[:, None] * acts[..., None].to(value)
        return lambda activation: activation + shift.to(activation)

    return {site: adding(value) for site, value in plan.vectors.items()}


def read_texts(writer: ContestWriter, cells: Sequence[Cell], replies: Sequence[str], kept: KeyedLog, what: str) -> list[float]:
    """Nats per token of neutral replies to the prompts of some cells, as the cells' methods would write.

    Texts are read in batches of their order, whatever the method, so that two methods meet the same batches and what differs between them
    is the steering.

    Args:
        kept: what was read before, so that the same call goes on; what: for the progress bar.
    """
    model = writer.model
    prompts = [writer.request(cell).ids for cell in cells]
    texts = [tuple(model.text_ids(reply)) for reply in replies]
    keys = [sha256_text(json.dumps([writer.key(cell), text])) for cell, text in zip(cells, texts, strict=True)]
    with bar(f"{what} (texts)", len(cells)) as advance:
        for start in range(0, len(cells), BATCH):
            some = range(start, min(start + BATCH, len(cells)))
            if any(keys[i] not in kept.rows for i in some):
                plan = writer.plan([cells[i] for i in some])
                values = text_nll(model, [prompts[i] for i in some], [texts[i] for i in some], plan)
                kept.add({keys[i]: {"nll": value} for i, value in zip(some, values, strict=True)})
            advance(len(some))
    return [float(kept.rows[key]["nll"]) for key in keys]
