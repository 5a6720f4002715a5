"""Replies that the model writes while it is asked for an emotion and a circuit is ablated, read by blind judges: the check, on a few
prompts, that what likelihoods say is seen in the text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from emosteer.base.files import sha256_text
from emosteer.base.jsonl import KeyedLog
from emosteer.base.progress import bar
from emosteer.circuits.validation.bench import Bench
from emosteer.circuits.validation.intervals import Resampled, estimate
from emosteer.circuits.validation.settings import FEW
from emosteer.circuits.validation.trials import CLEAN, OWN, WHOLE, Sets, focus_label
from emosteer.circuits.validation.unit_sets import UnitSet
from emosteer.generation.decoding import Decoding
from emosteer.generation.generate import Request, generate
from emosteer.judges.jury import Jury
from emosteer.judges.protocol import ANSWERED
from emosteer.models.interventions import RowEdits
from emosteer.models.sites import MLP_POST, Site, Z
from emosteer.scenarios.prompts import elicit
from emosteer.scenarios.scenarios import Group

#: What is written: greedily, without guidance, which knows nothing of edits.
DECODING = Decoding(max_new_tokens=40)
Row = dict[str, Any]


def written_replies(bench: Bench, jury: Jury) -> list[Row]:
    """Writes and reads the replies to the first prompts in every emotion: nothing ablated, the circuit at the focus and whole, and random
    sets of both sizes together. One row each (`schema.Written`).

    Replies and opinions that are kept on the jury's disk are not made again.
    """
    groups, points = bench.groups[: bench.settings.written], points_of(bench)
    texts: dict[tuple[str, str], list[str]] = {}
    with bar("replies under ablation (sets)", len(points)) as advance:
        for who, size in points:
            texts[who, size] = _texts(bench, who, size, jury.kept)
            advance(1)
    said = [group.said for _ in bench.sets for group in groups]
    everything = [text for some in texts.values() for text in some]
    pairs = [pair for some in texts.values() for pair in zip(said, some, strict=True)]
    readings, verdicts = jury.readings(everything, "replies"), jury.verdicts(everything, "replies")
    answering = jury.answering(pairs, "replies")
    found: dict[tuple[str, str], list[Tensor]] = {}
    wanted = [sets.emotion for sets in bench.sets for _ in groups]
    for (who, size), some in texts.items():
        read = [readings[text].label == emotion for text, emotion in zip(some, wanted, strict=True)]
        answers = [answering[pair] >= ANSWERED for pair in zip(said, some, strict=True)]
        sound = [verdicts[text].sound for text in some]
        figures = torch.tensor([read, answers, sound]).float().view(3, len(bench.sets), len(groups))
        found.setdefault((who.partition(":")[0], size), []).append(figures)
    return [_row(bench, who, size, torch.stack(several).mean(0)) for (who, size), several in found.items()]


def points_of(bench: Bench) -> list[tuple[str, str]]:
    """(whose units are ablated, size) of all that is written; emotions whose circuit is no larger than the focus have it whole there."""
    points = [(CLEAN, WHOLE)]
    for size in dict.fromkeys((focus_label(bench.sets, bench.settings), WHOLE)):
        points += [(OWN, size), *((f"random:{i}", size) for i in range(min(FEW, bench.settings.randoms)))]
    return points


def _row(bench: Bench, who: str, size: str, figures: Tensor) -> Row:
    """figures: [emotion read, answers, sound] x [emotion, prompt]."""
    draws = Resampled.of(figures.shape[-1], bench.settings.seed)
    estimates = {
        name: estimate(draws.means(values).mean(1)).record() for name, values in zip(("emotion", "answers", "sound"), figures, strict=True)
    }
    by_emotion = {sets.emotion: share for sets, share in zip(bench.sets, figures[0].mean(1).tolist(), strict=True)}
    return {"who": who, "size": size, "replies": figures[0].numel(), **estimates, "by_emotion": by_emotion}


def _texts(bench: Bench, who: str, size: str, kept: KeyedLog) -> list[str]:
    """Replies of one kind of set: by emotion, then by prompt."""
    model, rows, requests = bench.model, rows_of(bench), requests_of(bench)
    units = [sets.of(sets.size_here(size), who) if who != CLEAN else None for sets, _ in rows]
    members = [one and [one.heads.nonzero().tolist(), one.neurons.nonzero().tolist()] for one in units]
    means = hashlib.sha256()  # what replaces the units, whatever it was made from
    for site in sorted(bench.references.means, key=str):
        means.update(bench.references.means[site].double().cpu().numpy().tobytes())
    told = [model.sha256, model.precision, asdict(DECODING), [request.ids for request in requests], members, means.hexdigest()]
    key = sha256_text(json.dumps(told))
    if key not in kept.rows:
        edits = None if who == CLEAN else edits_of(bench, [one for one in units if one is not None])
        kept.add({key: {"replies": [reply.text for reply in generate(model, requests, decoding=DECODING, row_edits=edits)]}})
    return list(kept.rows[key]["replies"])


def rows_of(bench: Bench) -> list[tuple[Sets, Group]]:
    """What is written at each point: by emotion, then by prompt."""
    return [(sets, group) for sets in bench.sets for group in bench.groups[: bench.settings.written]]


def requests_of(bench: Bench) -> list[Request]:
    """The rows' prompts, which ask for their emotion."""
    how, instruction, model = bench.settings.elicitations[0], bench.circuit.instruction, bench.model
    asked = [(f"{group.key}/{s.emotion}", elicit(how, group.text, s.emotion, instruction, group.earlier)) for s, group in rows_of(bench)]
    return [Request(key, tuple(model.prompt_ids(messages))) for key, messages in asked]


def edits_of(bench: Bench, units: Sequence[UnitSet]) -> RowEdits:
    """Each row's units at their neutral means."""
    model, masks = bench.model, dict[Site, Tensor]()
    for layer in range(model.shape.n_layers):
        for kind, members in (
            (Z, torch.stack([one.heads[layer].repeat_interleave(model.shape.d_head) for one in units])),
            (MLP_POST, torch.stack([one.neurons[layer] for one in units])),
        ):
            if members.any():
                masks[Site(layer, kind)] = members.to(model.device)
    values = {site: bench.references.means[site].to(model.device).expand(len(units), -1) for site in masks}
    return RowEdits(masks, values)
