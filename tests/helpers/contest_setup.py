"""A small contest for tests: a tiny model, a circuit planted into it that writes an emotion's words, and judges who know these words."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from emosteer.base.jsonl import JsonlLog, KeyedLog
from emosteer.circuits.assemble import assemble
from emosteer.circuits.circuit import Circuit
from emosteer.circuits.methods import CIRCUIT, CONTEST, LEARNED_RESIDUAL, RESIDUAL, source_of
from emosteer.circuits.settings import CircuitSettings
from emosteer.directions.directions import Directions
from emosteer.directions.extract import extract
from emosteer.directions.settings import Settings
from emosteer.evaluation.controls import added_key, vectors_of
from emosteer.generation.decoding import Decoding
from emosteer.judges.jury import Jury
from emosteer.judges.protocol import LABELS, Opinion, Soundness
from emosteer.models.model import Model
from emosteer.scenarios.scenarios import NEUTRAL, VALENCES, Group, GroupKey, Message
from emosteer.writing.contest_writer import ContestWriter
from tests.conftest import build, small_data

EMOTIONS = ("anger", "sadness", "happiness")
#: What the planted circuit makes the model say; the judge takes these words for the emotion.
WORD = {"anger": "slam", "sadness": "cry", "happiness": "laugh"}
INSTRUCTION = "keep the reply"
PLACES = ("office", "train", "flat", "desk", "door", "home", "permit", "landlord", "boss", "call", "weeks", "nine", "alone")


def groups(count: int, start: int = 0) -> list[Group]:
    """Scenario-events whose prompts all differ; three valences to a scenario."""
    found = []
    for index in range(start, start + count):
        scenario, valence = divmod(index, 3)
        words = [PLACES[scenario % len(PLACES)], VALENCES[valence], PLACES[(scenario * 5 + valence) % len(PLACES)]]
        key = GroupKey(f"s{scenario:02d}", VALENCES[valence])
        found.append(
            Group(
                key,
                f"theme{scenario % 2}",
                f"i waited at the {words[0]} and the {words[2]} {['came back', 'was late', 'went home'][valence]}",
            )
        )
    return found


def prompts(count: int) -> list[Group]:
    """Prompts that are no scenario-events: chats with an earlier turn, questions and one-liners by turns."""
    found = []
    for index in range(count):
        kind, place = ("chat", "question", "one-liner")[index % 3], PLACES[index % len(PLACES)]
        said = (Message("user", f"the {place} was late"), Message("assistant", "why was it")) if kind == "chat" else ()
        found.append(Group(GroupKey(f"p{index:02d}", ""), kind, f"i waited at the {PLACES[(index + 4) % len(PLACES)]}", kind, said))
    return found


@lru_cache
def parts() -> tuple[Model, Circuit, Directions]:
    """The tiny model, real directions of it, and a circuit with two planted heads per emotion in the last layer and one before.

    What the circuit and the residual directions write is the unembedding of the emotion's word, less the mean of all words.
    """
    model = build("llama")
    some, bank = small_data(3, EMOTIONS)
    directions = extract(model, some, Settings(EMOTIONS, holdout=0, instruction=INSTRUCTION), bank=bank)
    circuit = assemble(model, directions, some, CircuitSettings(n_prompts=2, n_random=0, head_share=0.25))
    unembedding = model.hf.lm_head.weight.float()
    vocabulary = model.tokenizer.get_vocab()
    wanted = torch.stack([unembedding[vocabulary[WORD[e]]] - unembedding.mean(0) for e in EMOTIONS])
    wanted = wanted / wanted.norm(dim=-1, keepdim=True)
    z, heads = torch.zeros_like(circuit.z_delta), torch.zeros_like(circuit.heads)
    width = model.shape.d_head
    for e in range(len(EMOTIONS)):
        for layer, members in ((1, (e,)), (2, (e, 3))):
            heads[e, layer, list(members)] = True
            columns = [c for h in members for c in range(h * width, (h + 1) * width)]
            written = model.w_o(layer).flatten(0, 1).float()[columns]
            # the nearest to the word that these heads can write
            z[e, layer, columns] = torch.linalg.lstsq(written.T, wanted[e]).solution * (16.0 if layer == 2 else 0.5)
    vectors = wanted[:, None].expand(-1, model.shape.n_layers, -1).contiguous()
    planted = replace(circuit, z_delta=z, heads=heads, vectors=vectors, strength=torch.full((len(EMOTIONS),), 2.0), residual_strength=4.0)
    # as if learning had found the length that plain steering needs its strength for
    learned = 4.0 * vectors[:, list(planted.residual_layers)] * planted.rms[list(planted.residual_layers), None]
    return model, replace(planted, learned_residual=learned), directions


def contest(
    folder: Path, methods: Sequence[str] = CONTEST, decoding: Decoding | None = None, batch_size: int = 8, seed: int = 0
) -> ContestWriter:
    """The contest, with its replies in a folder."""
    model, circuit, directions = parts()
    return ContestWriter(
        model=model,
        emotions=EMOTIONS,
        vectors={m: vectors_of(model, circuit, directions, m, seed) for m in methods},
        added={m: added_key(circuit, directions, m, seed) for m in methods},
        decoding=decoding or Decoding(max_new_tokens=6),
        instruction=INSTRUCTION,
        replies=KeyedLog(folder / "replies.jsonl"),
        batch_size=batch_size,
    )


def defaults() -> dict[str, dict[str, float | None]]:
    """Default strengths of every method that has any."""
    strengths = {CIRCUIT: 2.0, RESIDUAL: 4.0, LEARNED_RESIDUAL: 1.0}
    return {method: dict.fromkeys(EMOTIONS, strengths[source_of(method)]) for method in CONTEST if source_of(method) in strengths}


def kill_after(patch: pytest.MonkeyPatch, rows: int) -> None:
    """Ends the run once so many rows are on disk, in the middle of a batch if need be."""
    append, left = JsonlLog.append, rows

    def dying(self: JsonlLog, *new: Any) -> None:
        nonlocal left
        append(self, *new[:left])
        left -= len(new)
        if left < 0:
            raise KeyboardInterrupt

    patch.setattr(JsonlLog, "append", dying)


def chance(text: str) -> float:
    """A number in [0, 1) that depends on the text."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 16**8


@dataclass
class WordJudge:
    """Counts the planted words; a little chance of the text on top, so that opinions differ. asked: every text it was shown.

    fails: texts on which the call fails; local judges' last bits depend on the chunk where `neighbours` is set.
    """

    fails: Callable[[str], bool] = lambda text: False
    neighbours: bool = False
    name: str = "words"
    key: str = "words-1"
    asked: list[str] = field(default_factory=list)

    def opinions(self, texts: Sequence[str], done: Callable[[int, Opinion], None] | None = None) -> list[Opinion]:
        bits = chance("".join(texts)) * 1e-3 if self.neighbours else 0.0
        found = []
        for index, text in enumerate(texts):
            self.asked.append(text)
            found.append(Opinion(None, "HTTP 500") if self.fails(text) else self._opinion(text, bits))
            if done is not None:
                done(index, found[-1])
        return found

    @staticmethod
    def _opinion(text: str, bits: float) -> Opinion:
        votes = {label: 0.1 + chance(label + text) / 10 for label in LABELS}
        for emotion, word in WORD.items():
            votes[emotion] += 2.0 * text.split().count(word)
        votes[NEUTRAL] += 0.3 + bits
        total = sum(votes.values())
        return Opinion({label: share / total for label, share in votes.items()})


@dataclass
class WordCheck:
    """Unsound is what says one word four times."""

    key: str = "check-1"
    asked: list[str] = field(default_factory=list)

    def check(self, texts: Sequence[str]) -> list[Soundness]:
        self.asked += texts
        loops = [any(text.split().count(word) > 3 for word in set(text.split())) for text in texts]
        return [Soundness(not loop, ("repetition",) if loop else (), float(loop)) for loop in loops]


@dataclass
class WordAnswers:
    """A reply answers its prompt unless it is empty or says "never"."""

    key: str = "answers-1"
    asked: list[tuple[str, str]] = field(default_factory=list)

    def probabilities(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        self.asked += pairs
        return [0.1 if not reply or "never" in reply.split() else 0.9 for _, reply in pairs]


class BagEncoder:
    """Unit vectors of word counts: texts that share words are near."""

    def __call__(self, texts: Sequence[str]) -> Tensor:
        rows = torch.zeros(len(texts), 64)
        for row, text in zip(rows, texts, strict=True):
            for word in text.split() or [""]:
                row[int(chance(word) * 64)] += 1
        return torch.nn.functional.normalize(rows, dim=-1)


def jury(folder: Path, judge: WordJudge | Sequence[WordJudge] | None = None, check: WordCheck | None = None, paid: bool = False) -> Jury:
    """The judges, with what they say in a folder. judge: one, a panel of several, or a `WordJudge`; paid: whether all are."""
    judges = (judge or WordJudge(),) if judge is None or isinstance(judge, WordJudge) else tuple(judge)
    kept = KeyedLog(folder / "opinions.jsonl")
    return Jury(judges, check or WordCheck(), WordAnswers(), BagEncoder(), kept, frozenset(j.key for j in judges) if paid else frozenset())
