"""Ablation and enhancement curves: are the units causal while the model writes? Random sets of equal size beside every point.

Ablation: the model is asked for an emotion (`tone`) and writes with the top-k units zeroed, set to their mean, or resampled from
another emotion. Enhancement: it is asked for nothing and the units' mean contrast is added. What comes out is scored as text, by
the intact model (see `TextScore`), so that an ablated model does not mark its own work.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emosteer.attribution.settings import ABLATIONS, ENHANCE, CurveSettings
from emosteer.attribution.unit_scores import UnitScores, top_units
from emosteer.base.errors import DataError
from emosteer.base.files import sha256_text
from emosteer.base.jsonl import JsonlLog, whole_rows
from emosteer.base.processes import ALONE, Crew, part, parts
from emosteer.base.progress import bar
from emosteer.directions.activations import Sample, batches_by_cost, read_states
from emosteer.directions.directions import Directions
from emosteer.generation.decoding import Decoding
from emosteer.generation.generate import Request, generate
from emosteer.models.interventions import RowEdits, unit_masks
from emosteer.models.model import Model
from emosteer.models.sites import RESID_POST, Head, Neuron, Site, Unit, Z
from emosteer.scenarios.prompts import elicit, plain
from emosteer.scenarios.scenarios import Group, GroupKey
from emosteer.scenarios.splits import spread, stable_share


class TextScore:
    """How strongly a text reads as an emotion to the intact model.

    The text is put behind the plain prompt, the residual stream is averaged over the positions that write it, and per layer of the
    stable band `(h - base) . v[e] / |m[e]|` is taken; the mean over the band is the score. Replies of the bank average 1, replies of
    no emotion about 0. It shares the directions with what is tested, so it is a measure of effect, not an independent judge.
    """

    def __init__(self, model: Model, directions: Directions, band: Sequence[int], instruction: str) -> None:
        """band: the layers that are read."""
        index = [directions.sites.index(Site(layer, RESID_POST)) for layer in band]
        self.model, self.instruction = model, instruction
        self.sites = [Site(layer, RESID_POST) for layer in band]
        self.base = directions.base[index]
        self.scaled = directions.vectors[:, index] / directions.norms[:, index, None]

    def __call__(self, prompts: Sequence[Group], texts: Sequence[str], batch_tokens: int = 4096) -> Tensor:
        """Scores of texts [text, emotion]. prompts: what each text replies to."""
        replies = [tuple(self.model.text_ids(text)) for text in texts]
        answering: dict[tuple[int, ...], list[int]] = {}  # the texts of one prompt are read behind it together
        for index, prompt in enumerate(prompts):
            ids = tuple(self.model.prompt_ids(plain(prompt.text, self.instruction, prompt.earlier)))
            answering.setdefault(ids, []).append(index)
        groups = list(answering.values())
        samples = [
            Sample(GroupKey(str(number), ""), "", (ids,) * len(group), tuple(replies[i] for i in group))
            for number, (ids, group) in enumerate(answering.items())
        ]
        scores = torch.zeros(len(replies), self.scaled.shape[0])
        for count in sorted({len(group) for group in groups}):
            alike = [sample for sample in samples if len(sample.prompts) == count]
            for batch in batches_by_cost(alike, batch_tokens):
                states = read_states(self.model, batch, self.sites)
                h = torch.stack([states[site].cpu() for site in self.sites], dim=2)
                projections = torch.einsum("gtld,eld->gte", h - self.base, self.scaled) / len(self.sites)
                for sample, rows in zip(batch, projections, strict=True):
                    scores[groups[int(sample.key.scenario)]] = rows
        return scores


@dataclass(frozen=True)
class Condition:
    """One point of a curve. kind: zero, mean, resample or enhance; unit: "heads" or "neurons"; share: of all units of that kind;
    who: "top" or "random:3"."""

    kind: str
    unit: str
    share: float
    who: str


def conditions(settings: CurveSettings) -> list[Condition]:
    """Every point: the two baselines (asked for the emotion or not, nothing done), the top units, and their random controls."""
    points = [Condition("none", "heads", 0.0, "asked"), Condition("none", "heads", 0.0, "plain")]
    for unit, shares in (("heads", settings.shares), ("neurons", settings.neuron_shares)):
        for kind in settings.kinds:
            for share in shares:
                points += [Condition(kind, unit, share, who) for who in ("top", *(f"random:{i}" for i in range(settings.n_random)))]
    return points


def units_of(model: Model, scores: UnitScores, emotion: int, point: Condition, seed: int) -> list[Unit]:
    """The units that a condition acts on."""
    table, make = (scores.heads[emotion], Head) if point.unit == "heads" else (scores.neurons[emotion], Neuron)
    count = max(1, round(table.numel() * point.share)) if point.share else 0
    if point.who == "top":
        return top_units(table, count, make)
    if not point.who.startswith("random"):
        return []
    picked = random.Random(f"{seed}/{point.unit}/{point.share}/{point.who}/{emotion}").sample(range(table.numel()), count)
    return [make(index // table.shape[1], index % table.shape[1]) for index in picked]


def require_prompts(groups: Sequence[Group], settings: CurveSettings) -> None:
    """Raises a DataError if there are fewer prompts than the curves want."""
    if len(groups) < settings.n_prompts:
        raise DataError(f"the curves need {settings.n_prompts} scenario-events, found {len(groups)}; lower --prompts")


def curves(
    model: Model,
    directions: Directions,
    scores: UnitScores,
    groups: Sequence[Group],
    band: Sequence[int],
    settings: CurveSettings,
    *,
    partial: Path | None = None,
    points: Sequence[Condition] | None = None,
    crew: Crew = ALONE,
) -> list[dict[str, Any]]:
    """Measures the points; with `partial`, finished ones are kept there and a rerun resumes.

    Args:
        crew: the processes that share the points; each keeps its own beside `partial`, and all get all.

    Returns:
        One row per point and emotion: the condition's fields, emotion, score (mean over prompts), n.

    Raises:
        DataError: if there are fewer groups than prompts wanted.
    """
    require_prompts(groups, settings)
    chosen = spread(groups, settings.n_prompts, settings.seed)
    points = list(points or conditions(settings))
    key = _run_key(model, directions, chosen, settings)
    log = JsonlLog(part(partial, crew.rank)) if partial is not None else None

    def finished() -> dict[str, dict[str, float]]:
        rows = (row for path in (parts(partial).values() if partial is not None else ()) for row in whole_rows(path))
        return {row["point"]: row["scores"] for row in rows if row.get("key") == key}

    crew.meet()  # all have ended the torn lines of their files
    done = finished()
    crew.kept = lambda: f"{len(finished())} of {len(points)} points of the curves are kept in {partial}*"
    crew.meet()  # nobody writes before all have read
    names = {point: json.dumps(asdict(point), sort_keys=True) for point in points}
    todo = [point for point in points if names[point] not in done]
    run = Runner(model, directions, scores, chosen, TextScore(model, directions, band, directions.instruction), settings)
    with bar("ablation curves (points)", len(points), len(points) - len(todo)) as advance:
        for point in crew.claim(todo):
            done[names[point]] = run(point)
            if log:
                log.append({"key": key, "point": names[point], "scores": done[names[point]]})
            advance(crew.world)
    crew.meet()
    done = done if crew.alone else finished()
    return [{**asdict(p), "emotion": e, "score": s, "n": len(chosen)} for p in points for e, s in done[names[p]].items()]


def kept_points(partial: Path, model: Model, directions: Directions, groups: Sequence[Group], settings: CurveSettings) -> int:
    """How many points earlier runs of the same settings left on disk."""
    key = _run_key(model, directions, spread(groups, settings.n_prompts, settings.seed), settings)
    return len({row["point"] for path in parts(partial).values() for row in whole_rows(path) if row.get("key") == key})


def _run_key(model: Model, directions: Directions, chosen: Sequence[Group], settings: CurveSettings) -> str:
    """What a point depends on beside itself. chosen: the prompts that are written to."""
    origin = directions.provenance.origin()
    shaping = [model.sha256, model.precision, asdict(settings), [g.said for g in chosen], directions.emotions, origin]
    return sha256_text(json.dumps(shaping, sort_keys=True, default=str))


class Runner:
    """Writes and scores the replies of one condition: every emotion and prompt in one batch."""

    def __init__(
        self,
        model: Model,
        directions: Directions,
        scores: UnitScores,
        groups: Sequence[Group],
        score: Callable[[Sequence[Group], Sequence[str]], Tensor],
        settings: CurveSettings,
    ) -> None:
        self.model, self.directions, self.unit_scores = model, directions, scores
        self.groups, self.score, self.settings = groups, score, settings

    def __call__(self, point: Condition) -> dict[str, float]:
        emotions, settings = self.directions.emotions, self.settings
        rows = [(e, g) for e in range(len(emotions)) for g in range(len(self.groups))]
        asked = point.kind in ABLATIONS or point.who == "asked"
        requests = [self._request(emotions[e], g, asked) for e, g in rows]
        units = [units_of(self.model, self.unit_scores, e, point, settings.seed) for e in range(len(emotions))]
        texts: list[str] = []
        decoding = Decoding(max_new_tokens=settings.max_new_tokens, seed=settings.seed)
        for start in range(0, len(rows), settings.batch_size):
            part = slice(start, start + settings.batch_size)
            edits = self._edits(point, rows[part], units)
            texts += [reply.text for reply in generate(self.model, requests[part], decoding=decoding, row_edits=edits)]
        by_emotion = self.score([self.groups[g] for _, g in rows], texts)
        asked_for = torch.tensor([by_emotion[i, e] for i, (e, _) in enumerate(rows)]).view(len(emotions), -1).mean(1)
        return dict(zip(emotions, asked_for.tolist(), strict=True))

    def _request(self, emotion: str, group: int, asked: bool) -> Request:
        prompt, instruction = self.groups[group], self.directions.instruction
        asks = elicit("tone", prompt.text, emotion, instruction, prompt.earlier) if asked else None
        messages = asks or plain(prompt.text, instruction, prompt.earlier)
        return Request(f"{prompt.key}/{emotion}", tuple(self.model.prompt_ids(messages)))

    def _edits(self, point: Condition, rows: Sequence[tuple[int, int]], units: Sequence[Sequence[Unit]]) -> RowEdits | None:
        if point.kind == "none":
            return None
        masks = unit_masks(self.model, [units[e] for e, _ in rows])
        if point.kind == "zero":
            return RowEdits(masks, None)
        values = {site: self._values(point, site, rows).to(self.model.device) for site in masks}
        return RowEdits(masks, values, scale=self.settings.strength if point.kind == ENHANCE else None)

    def _values(self, point: Condition, site: Site, rows: Sequence[tuple[int, int]]) -> Tensor:
        """What replaces or shifts the units, one row each. rows: (emotion, prompt).

        mean: over all emotions and groups; resample: a draw from the unit's distribution under another emotion (its mean and variance
        over groups, each entry by itself); enhance: the emotion's own mean contrast.
        """
        stats = self.directions.z if site.kind == Z else self.directions.mlp
        base, contrast, variance = stats.base[site.layer], stats.mean[:, site.layer], stats.variance[:, site.layer]
        if point.kind == "mean":
            return base.expand(len(rows), -1)
        if point.kind == ENHANCE:
            return contrast[[e for e, _ in rows]]
        drawn = []
        for emotion, prompt in rows:  # seeded by the row itself, so that batches do not matter
            seed = stable_share(f"resample/{emotion}/{prompt}/{site}", self.settings.seed)
            noise = torch.Generator().manual_seed(int(seed * 2**53))
            shift = 1 + int(torch.randint(len(contrast) - 1, (), generator=noise))
            other = (emotion + shift) % len(contrast)
            drawn.append(base + contrast[other] + variance[other].sqrt() * torch.randn(base.shape, generator=noise))
        return torch.stack(drawn)
