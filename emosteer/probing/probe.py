"""The whole run: states, probes of every place, their controls, the model asked, what lasts, and what moves them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emosteer.base import artifacts
from emosteer.base.artifacts import Provenance, versions
from emosteer.base.errors import ModelError
from emosteer.base.files import kept_progress, sha256_text
from emosteer.base.progress import bar, note
from emosteer.models.model import Model
from emosteer.models.sites import MLP_OUT, RESID_MID, RESID_POST, Site, Z
from emosteer.probing import measures, training
from emosteer.probing.malleability import Steering, malleability, n_conditions
from emosteer.probing.persistence import persistence
from emosteer.probing.probes import LINEAR, NONLINEAR, Probes
from emosteer.probing.prompting import asked
from emosteer.probing.reading import BLANK, KIND, States, frame, read_shards, text_row
from emosteer.probing.settings import HEADS, ProbeSettings
from emosteer.probing.texts import Texts
from emosteer.scenarios.contamination import likeliest, log_shares
from emosteer.scenarios.scripts import words

SITE_KINDS = {HEADS: Z, RESID_MID: RESID_MID, RESID_POST: RESID_POST, MLP_OUT: MLP_OUT}
METHOD = "probes on states of texts in the user's turn, fitted by passes over shards, penalty by cross-validation, shuffled labels beside"


@dataclass(frozen=True, eq=False)
class Piece:
    """The probes of one place. weights: [unit, run, label, width] and biases [unit, run, label], for states as they are; empty for the
    non-linear ones; probabilities: [unit, run, test text, label]; decays, losses: [unit]. Run 0 has the true labels."""

    weights: Tensor
    biases: Tensor
    probabilities: Tensor
    decays: Tensor
    losses: Tensor

    def fitted(self, unit: int) -> training.Fitted:
        """The linear probes of one unit, for states as they are."""
        weights = self.weights[unit].permute(2, 0, 1)[None]  # [1, width, run, label]
        width = weights.shape[1]
        return training.Fitted(torch.zeros(1, width), torch.ones(1, width), (weights, self.biases[unit][None]))


def probe(
    model: Model,
    texts: Texts,
    settings: ProbeSettings,
    folder: Path,
    *,
    steering: Steering | None = None,
    parents: Mapping[str, str] | None = None,
    fresh: bool = False,
) -> Probes:
    """Fits and measures probes.

    Args:
        folder: where progress is kept, so that the same call goes on; the caller removes it once the result is saved.
        steering: what a circuit adds, for the malleability; without, only system lines are tried.
        parents: artefact kind -> sha256 of the file that the steering is from.
        fresh: start over.

    Raises:
        DataError: if a text cannot be read. EmosteerError: if another run keeps its progress in the folder at this moment.
    """
    with kept_progress(folder):
        for old in folder.iterdir() if fresh else ():
            shutil.rmtree(old, ignore_errors=True)
        return _probe(model, texts, settings, folder / _fingerprint(model, texts, settings), steering, parents or {})


def _probe(
    model: Model, texts: Texts, settings: ProbeSettings, place: Path, steering: Steering | None, parents: Mapping[str, str]
) -> Probes:
    """place: where the progress of this very run is."""
    before = frame(model)
    rows = [text_row(model, before, text.text, settings.read, settings.longest) for text in texts.texts]
    sites = [Site(layer, SITE_KINDS[kind]) for kind in settings.kinds for layer in range(model.shape.n_layers)]
    heads = {str(site): model.shape.n_heads for site in sites if site.kind == Z}
    states = read_shards(model, rows, sites, place / "states", budget=settings.batch_tokens, units=heads)
    pieces = _pieces(states, texts, settings, sites, place)
    points = [row for (kind, layer, form), piece in pieces.items() for row in _rows(kind, layer, form, piece, texts)]
    best = {kind: _best(points, kind) for kind in settings.kinds}
    whole = [kind for kind in settings.kinds if kind != HEADS]
    chosen = min(whole or settings.kinds, key=lambda kind: best[kind]["held_out_loss"])
    reader = pieces[chosen, best[chosen]["layer"], LINEAR]
    unit, site = best[chosen]["unit"], Site(best[chosen]["layer"], SITE_KINDS[chosen])
    read = reader.probabilities[unit, 0]
    labels = torch.tensor(texts.numbers)[texts.test]
    notes: list[str] = []
    if not whole:
        notes.append("persistence and malleability are read in the stream or in what the MLP writes, and only heads were probed")
    prompting = _prompting(model, texts, settings, read, place, notes)
    lasting = _persistence(model, texts, settings, site, float(reader.decays[unit]), place, notes) if whole else {}
    moved = _malleability(model, texts, settings, site, reader.fitted(unit), steering, notes) if whole else {}
    linear = {kind: [pieces[kind, layer, LINEAR] for layer in range(model.shape.n_layers)] for kind in settings.kinds}
    return Probes(
        labels=texts.labels,
        weights={kind: torch.stack([piece.weights[:, 0] for piece in some]) for kind, some in linear.items()},
        biases={kind: torch.stack([piece.biases[:, 0] for piece in some]) for kind, some in linear.items()},
        read=settings.read,
        texts={"train": len(texts.train), "test": len(texts.test)},
        left_out=texts.left_out,
        points=points,
        best={kind: {"layer": row["layer"], "unit": row["unit"]} for kind, row in best.items()},
        chosen=chosen,
        confusion=measures.confusion(read.argmax(-1), labels, len(texts.labels)),
        lexical=lexical(texts),
        prompting=prompting,
        persistence=lasting,
        malleability=moved,
        notes=tuple(notes),
        provenance=_provenance(model, texts, settings, parents),
    )


def _fingerprint(model: Model, texts: Texts, settings: ProbeSettings) -> str:
    """A name for the progress of exactly this run."""
    rows = [[text.text, text.label, text.group, fold] for text, fold in zip(texts.texts, texts.folds, strict=True)]
    return sha256_text(json.dumps([rows, asdict(settings), model.sha256, model.precision, model.template_sha256, torch.__version__]))[:16]


def _provenance(model: Model, texts: Texts, settings: ProbeSettings, parents: Mapping[str, str]) -> Provenance:
    return Provenance(
        model=model.name,
        model_sha256=model.sha256,
        template_sha256=model.template_sha256,
        method=METHOD,
        params={**json.loads(json.dumps(asdict(settings))), "dtype": model.precision, "device": model.device.type},
        seed=settings.seed,
        data=dict(texts.hashes),
        parents=dict(parents),
        versions=versions(),
    )


# ---- probes of every place -------------------------------------------------------------------------------------------


def _pieces(states: States, texts: Texts, settings: ProbeSettings, sites: Sequence[Site], place: Path) -> dict[tuple[str, int, str], Piece]:
    """(kind, layer, form) -> probes, those that an earlier run left on disk among them."""
    kinds = {site_kind: kind for kind, site_kind in SITE_KINDS.items()}
    wanted = [(kinds[site.kind], site, LINEAR) for site in sites]
    wanted += [(kind, site, NONLINEAR) for kind, site, _ in wanted if settings.hidden and kind != HEADS]
    found: dict[tuple[str, int, str], Piece] = {}
    with bar("probe (places)", len(wanted)) as advance:
        for kind, site, form in wanted:
            file = place / f"{form}-{site}.safetensors"
            if not file.exists():
                made = _fit(lambda site=site: states.shards(str(site)), texts, settings, settings.hidden if form == NONLINEAR else 0)  # type: ignore[misc]
                artifacts.save(file, KIND, {}, vars(made), BLANK)
            found[kind, site.layer, form] = Piece(**artifacts.load(file, KIND).tensors)
            advance(1)
    return found


def _fit(shards: training.Shards, texts: Texts, settings: ProbeSettings, hidden: int) -> Piece:
    labels, folds, n_labels = torch.tensor(texts.numbers), torch.tensor(texts.folds), len(texts.labels)
    how = {"hidden": hidden, "epochs": settings.epochs, "seed": settings.seed}
    decays, losses = training.choose_decay(shards, labels, folds, n_labels, settings.decays, **how)
    train = folds >= 0
    dealt = [labels, *(training.shuffled(labels, train, settings.seed + number) for number in range(settings.shuffles))]
    runs = training.Runs(torch.stack(dealt), train.float().expand(len(dealt), -1), decays[:, None].expand(-1, len(dealt)))
    fitted = training.fit(shards, runs, n_labels, **how)
    read = training.probabilities(shards, fitted, ~train)
    if hidden:
        return Piece(torch.zeros(0), torch.zeros(0), read, decays, losses)
    weights = fitted.layers[0].permute(0, 2, 3, 1) / fitted.scale[:, None, None]
    biases = fitted.layers[1] - torch.einsum("urkw,uw->urk", weights, fitted.mean)
    return Piece(weights.contiguous(), biases, read, decays, losses)


def _rows(kind: str, layer: int, form: str, piece: Piece, texts: Texts) -> list[dict[str, Any]]:
    labels, groups = torch.tensor(texts.numbers)[texts.test], [texts.texts[i].group for i in texts.test]
    rows = []
    for unit, runs in enumerate(piece.probabilities):
        told = measures.measured(runs[0], labels, groups)
        shuffled = float((runs[1:].argmax(-1) == labels).double().mean())
        row = {"kind": kind, "layer": layer, "unit": unit, "form": form, "decay": float(f"{float(piece.decays[unit]):.6g}")}
        row |= {"held_out_loss": round(float(piece.losses[unit]), 6), **told, "shuffled": round(shuffled, 6)}
        rows.append({**row, "selectivity": round(told["accuracy"]["value"] - shuffled, 6)})
    return rows


def _best(points: Sequence[Mapping[str, Any]], kind: str) -> Mapping[str, Any]:
    """A kind's linear probe with the least loss in cross-validation: the test texts have no say in it."""
    return min((row for row in points if row["kind"] == kind and row["form"] == LINEAR), key=lambda row: float(row["held_out_loss"]))


# ---- beside them -----------------------------------------------------------------------------------------------------


def lexical(texts: Texts) -> dict[str, float]:
    """Accuracy on the test texts of naive Bayes on which words occur, ties shared."""
    said = [frozenset(words(text.text.lower())) for text in texts.texts]
    scores = log_shares([texts.texts[i].label for i in texts.train], [said[i] for i in texts.train], texts.labels)
    numbers, hits = texts.numbers, []
    for i in texts.test:
        best = likeliest(said[i], scores, len(texts.labels))
        hits.append((numbers[i] in best) / len(best))
    return measures.share(hits, [texts.texts[i].group for i in texts.test])


def _prompting(model: Model, texts: Texts, settings: ProbeSettings, read: Tensor, place: Path, notes: list[str]) -> dict[str, Any]:
    """The model's own answers about some of the test texts, beside the probe's on the same."""
    if not settings.prompted:
        return {}
    chosen = texts.some(texts.test, max(1, settings.prompted // len(texts.labels)))
    try:
        answers = asked(model, texts, chosen, settings.shots, place / "answers.jsonl")
    except ModelError as error:
        notes.append(f"the model was not asked: {error}")
        note(notes[-1])
        return {}
    labels, groups = torch.tensor([texts.numbers[i] for i in chosen]), [texts.texts[i].group for i in chosen]
    where = [texts.test.index(i) for i in chosen]
    probe_hits = (read[where].argmax(-1) == labels).double().tolist()
    found = {}
    for name, shares in answers.items():
        hits = (shares.argmax(-1) == labels).double().tolist()
        found[name] = {**measures.measured(shares, labels, groups), "probe_less": measures.difference(probe_hits, hits, groups)}
    return {"texts": len(chosen), "shots": settings.shots, "probe": measures.share(probe_hits, groups), "asked": found}


def _persistence(
    model: Model, texts: Texts, settings: ProbeSettings, site: Site, decay: float, place: Path, notes: list[str]
) -> dict[str, Any]:
    if not settings.followed:
        return {}
    chosen = texts.some(range(len(texts.texts)), max(1, settings.followed // len(texts.labels)))
    if len({texts.texts[i].group for i in chosen}) < 2:
        notes.append("persistence was not measured: the texts to be followed are all replies to one prompt; raise --followed")
        note(notes[-1])
        return {}
    found = persistence(model, texts, chosen, site, decay, place / "followed", settings)
    if beyond := [distance for distance in settings.distances if distance > found["longest"]]:
        notes.append(f"distances {', '.join(map(str, beyond))} do not fit the context of {model.name} ({model.shape.context} tokens)")
        note(notes[-1])
    return found


def _malleability(
    model: Model,
    texts: Texts,
    settings: ProbeSettings,
    site: Site,
    reader: training.Fitted,
    steering: Steering | None,
    notes: list[str],
) -> dict[str, Any]:
    if not settings.moved:
        return {}
    chosen = texts.some(texts.test, max(1, settings.moved // len(texts.labels)))
    if steering is None:
        notes.append("steering was not tried: there is no circuit for this model")
    told = [(texts.texts[i].text, texts.texts[i].label, texts.texts[i].group) for i in chosen]
    how: dict[str, Any] = {"read": settings.read, "longest": settings.longest, "budget": settings.batch_tokens, "seed": settings.seed}
    with bar("move (conditions)", n_conditions(texts.labels, steering)) as advance:
        return malleability(model, told, texts.labels, site, reader, steering, **how, advance=advance)
