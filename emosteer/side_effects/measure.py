"""The whole run: replies under every condition, neutral text, feedback, long conversations, and the figures of all of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from emosteer.base.artifacts import Provenance, versions
from emosteer.base.jsonl import KeyedLog
from emosteer.base.progress import note
from emosteer.circuits.circuit import Circuit
from emosteer.circuits.methods import METHODS
from emosteer.evaluation.controls import added_key
from emosteer.generation.decoding import Decoding
from emosteer.models.model import Model
from emosteer.side_effects import conversations, figures, outcomes
from emosteer.side_effects.battery import CROSS, EVERYDAY, PLAIN, WARM, Battery
from emosteer.side_effects.checks import read_phrases
from emosteer.side_effects.conditions import Condition, conditions_of
from emosteer.side_effects.conversations import After
from emosteer.side_effects.outcomes import ASKED, ITEMS, MEASURES, REPLIES, TEXTS, Reader, Tables
from emosteer.side_effects.settings import SENTENCES, EffectsSettings, Limits
from emosteer.side_effects.side_effects import SideEffects
from emosteer.writing.contest_writer import ContestWriter

METHOD = "replies and neutral text under every condition, checked by committed lists, paired by prompt with the unsteered model"
#: Replies written at once to conversations of thousands of tokens.
LONG_BATCH = 12
#: Arms of the feedback: what is said when an answer is wrong.
PLAINLY, BY_TURNS = "plain", "warm and cross by turns"


def effects(
    model: Model,
    circuit: Circuit,
    circuit_sha256: str,
    battery: Battery,
    settings: EffectsSettings,
    folder: Path,
    read: Reader,
    *,
    judge: str = "",
    limits: Limits | None = None,
    batch_size: int = 64,
    fresh: bool = False,
) -> SideEffects:
    """Measures what steering does besides.

    Args:
        circuit_sha256: of its file; folder: where replies are kept, so that the same call goes on; the caller removes it once the result
            is saved; read: reads the emotion of replies to everyday prompts, blind; judge: what reads, for the record; limits: what the
            result is to be held against; batch_size: replies written at once; fresh: start over.

    Raises:
        ArtifactError: if the circuit has no dial, or lacks what a method adds. DataError: if a prompt does not fit the model's context.
    """
    if fresh:
        shutil.rmtree(folder, ignore_errors=True)
    n_sentences = min(len(battery.sentences[kind]) for kind in SENTENCES)
    conditions = conditions_of(circuit, settings, n_sentences)
    writer = _writer(model, circuit, settings, folder, batch_size)
    writers = {ITEMS: _longest(writer, settings.item_tokens), **dict.fromkeys(ASKED, _longest(writer, settings.reply_tokens))}
    written = outcomes.write_all(writers, battery, conditions)
    nll = outcomes.nll_table(writer, battery, conditions, KeyedLog(folder / "texts.jsonl"))
    tables = outcomes.tables_of(written, nll, battery, conditions, circuit.emotions, read_phrases(), read)
    notes: list[str] = []
    first = {i: row["text"] for (c, i), row in written[ITEMS].items() if c == 0}
    right = _feedback(writers[ITEMS], battery, first, settings)
    after = _after(writers[ASKED[0]], battery, circuit, settings, read, notes)
    kinds = [item.kind for item in battery.items]
    return SideEffects(
        emotions=circuit.emotions,
        outcomes=stored(tables),
        circuit_sha256=circuit_sha256,
        conditions=[_told(condition) for condition in conditions],
        rows=figures.rows_of(tables, conditions, circuit.emotions, kinds, settings.seed),
        unsteered=figures.unsteered_of(tables, kinds, settings.seed),
        patterns=figures.pattern_rows(tables, conditions),
        feedback=figures.feedback_rows(right, settings.seed),
        after=figures.long_rows(after, settings.seed),
        after_intensity=settings.followed_intensity,
        limits=dict((limits or Limits()).bounds),
        notes=tuple(notes),
        provenance=_provenance(model, battery, settings, circuit_sha256, judge),
    )


def _told(condition: Condition) -> dict[str, Any]:
    return {name: getattr(condition, name) for name in ("method", "emotion", "intensity", "strength")}


def stored(tables: Tables) -> dict[str, Tensor]:
    """The outcomes as an artefact holds them: no NaN, but which conditions were tried on which prompts."""
    sets = {name: next(m for m, own in MEASURES.items() if own == name) for name in (TEXTS, ITEMS, *ASKED, REPLIES)}
    tried = {f"tried.{name}": ~tables.values[measure].isnan() for name, measure in sets.items()}
    return tried | {measure: tables.values[measure].nan_to_num(0.0) for measure in MEASURES} | {"unsteered_felt": tables.unsteered_felt}


def _writer(model: Model, circuit: Circuit, settings: EffectsSettings, folder: Path, batch_size: int) -> ContestWriter:
    """Who writes everything. The settings' instruction is empty: items say themselves what is wanted."""
    steering = [method for method in settings.methods if method not in SENTENCES and METHODS[method].steers]
    parts = {method: METHODS[method].vectors for method in dict.fromkeys([*steering, "circuit"])}
    return ContestWriter(
        model=model,
        emotions=circuit.emotions,
        vectors={method: circuit.added(part, model) for method, part in parts.items() if part is not None},
        added={method: added_key(circuit, None, method, settings.seed) for method in parts},
        decoding=Decoding(guidance=settings.guidance, seed=settings.seed),
        instruction="",
        replies=KeyedLog(folder / "replies.jsonl"),
        batch_size=batch_size,
        fluent=False,
    )


def _longest(writer: ContestWriter, tokens: int) -> ContestWriter:
    return replace(writer, decoding=replace(writer.decoding, max_new_tokens=tokens), _prompts={})


def _feedback(writer: ContestWriter, battery: Battery, first: Mapping[int, str], settings: EffectsSettings) -> dict[str, Tensor]:
    """Accuracy by round of feedback, in both tones; nothing where it was left out."""
    if not settings.rounds or not battery.items:
        return {}
    said = battery.sentences
    arms = {PLAINLY: said[PLAIN], BY_TURNS: [said[WARM][0], said[CROSS][1]]}
    return conversations.second_chances(writer, battery, first, arms, settings.rounds)


def _after(
    writer: ContestWriter, battery: Battery, circuit: Circuit, settings: EffectsSettings, read: Reader, notes: list[str]
) -> list[After]:
    """Emotions after long conversations; nothing where they were left out."""
    if not settings.followed:
        return []
    if not any(not group.earlier for group in battery.asked[EVERYDAY]):
        notes.append("nothing was asked after long conversations: they end with everyday prompts, and there are none")
        note(notes[-1])
        return []
    strengths = {emotion: circuit.strength_at(emotion, settings.followed_intensity) for emotion in circuit.emotions}
    slow = replace(writer, batch_size=LONG_BATCH, _prompts={})
    found, beyond = conversations.after_long_talk(slow, battery, strengths, settings.distances, settings.followed, read)
    if beyond:
        name, context = writer.model.name, writer.model.shape.context
        notes.append(
            f"after {', '.join(map(str, beyond))} tokens nothing was tried: they do not fit the context of {name} ({context} tokens)"
        )
        note(notes[-1])
    return found


def _provenance(model: Model, battery: Battery, settings: EffectsSettings, circuit_sha256: str, judge: str) -> Provenance:
    return Provenance(
        model=model.name,
        model_sha256=model.sha256,
        template_sha256=model.template_sha256,
        method=METHOD,
        params={**json.loads(json.dumps(asdict(settings))), "dtype": model.precision, "device": model.device.type, "judge": judge},
        seed=settings.seed,
        data=dict(battery.hashes),
        parents={"circuit": circuit_sha256},
        versions=versions(),
    )
