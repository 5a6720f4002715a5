"""Replies of a circuit at chosen strengths on fixed prompts, and what a blind jury says of them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from emosteer.base.errors import DataError, UsageError
from emosteer.base.jsonl import KeyedLog
from emosteer.circuits.circuit import Circuit
from emosteer.circuits.methods import CIRCUIT, NONE
from emosteer.generation.decoding import Decoding
from emosteer.generation.fluency import EMPTY_NLL
from emosteer.judges.jury import Jury
from emosteer.judges.protocol import ANSWERED, LABELS
from emosteer.models.model import Model
from emosteer.scenarios.scenarios import Group
from emosteer.scenarios.words import stem_pattern
from emosteer.writing.contest_writer import Cell, ContestWriter, cells_of
from emosteer.writing.resumable import Row
from emosteer.writing.settings import BATCH_SIZE


@dataclass(frozen=True)
class StrengthPoint:
    """All replies of one emotion at one strength. judged: P(target) per prompt, None where the judge failed; ratio: perplexity against
    the unsteered replies to the same prompts; sound, names, answers: shares of the replies; ratio_error: standard error of the ratio's
    logarithm over prompts; good: share that the panel reads as the emotion, that is sound, answers its prompt and does not name it."""

    emotion: str
    strength: float
    judged: tuple[float | None, ...]
    ratio: float
    sound: float
    names: float
    ratio_error: float | None = None
    good: float = 0.0
    answers: float = 1.0

    @property
    def known(self) -> list[float]:
        """P(target) where there is one."""
        return [share for share in self.judged if share is not None]

    @property
    def mean(self) -> float:
        """Mean P(target)."""
        return fmean(self.known)

    @property
    def error(self) -> float | None:
        """Standard error of the mean; None with fewer than two prompts."""
        return standard_error(self.known)

    def rise_to(self, other: StrengthPoint) -> tuple[float, float | None]:
        """Mean difference in P(target) to a point on the same prompts, and its standard error."""
        pairs = [b - a for a, b in zip(self.judged, other.judged, strict=True) if a is not None and b is not None]
        return (fmean(pairs), standard_error(pairs)) if pairs else (other.mean - self.mean, None)


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of a mean; None with fewer than two values."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def circuit_key(circuit: Circuit) -> str:
    """A hash of everything that the circuit adds; its default strengths and metrics do not count."""
    parts = [circuit.z_delta, circuit.neuron_index, circuit.neuron_delta]
    content = b"".join(part.detach().cpu().contiguous().numpy().tobytes() for part in parts)
    return hashlib.sha256(json.dumps(circuit.emotions).encode() + content).hexdigest()


def require_labels(emotions: Sequence[str]) -> None:
    """Raises a UsageError if no judge has a label for one of the emotions."""
    unknown = [emotion for emotion in emotions if emotion not in LABELS]
    if unknown:
        raise UsageError(f"no judge knows the emotion '{unknown[0]}'; judges tell {', '.join(LABELS)} apart")


def written_before(model: Model, circuit: Circuit, groups: Sequence[Group], kept: KeyedLog, decoding: Decoding) -> int:
    """How many replies of such trials a log holds; 0 where its unsteered replies are to other prompts or of other settings."""
    contest = _contest_of(model, circuit, kept, decoding)
    if not any(contest.key(cell) in kept.rows for cell in cells_of(NONE, groups, {})):
        return 0
    return sum("nll" in row for row in kept.rows.values())


def _contest_of(model: Model, circuit: Circuit, kept: KeyedLog, decoding: Decoding, batch_size: int = BATCH_SIZE) -> ContestWriter:
    vectors, added = {CIRCUIT: circuit.steering(model)}, {CIRCUIT: circuit_key(circuit)}
    return ContestWriter(
        model, circuit.emotions, vectors, added, decoding, circuit.instruction, kept, batch_size, examples=circuit.examples
    )


class Trials:
    """A circuit that answers the same prompts at any strength. Replies and opinions that are kept on disk are not made again."""

    def __init__(
        self,
        model: Model,
        circuit: Circuit,
        jury: Jury,
        groups: Sequence[Group],
        kept: KeyedLog,
        decoding: Decoding,
        batch_size: int = BATCH_SIZE,
    ) -> None:
        """Writes the unsteered replies, which every ratio refers to.

        Args:
            kept: where the replies are kept; the jury's own file may be the same.

        Raises:
            DataError: if there is no scenario-event. UsageError: if no judge has a label for an emotion of the circuit.
        """
        if not groups:
            raise DataError("no scenario-event to write to; check the scenario file")
        require_labels(circuit.emotions)
        self.model, self.circuit, self.jury, self.groups, self.decoding = model, circuit, jury, list(groups), decoding
        self._contest = _contest_of(model, circuit, kept, decoding, batch_size)
        self._plain = self._contest.write(cells_of(NONE, self.groups, {}), "unsteered")

    def at(self, wanted: Sequence[tuple[str, float]], what: str = "trials") -> list[StrengthPoint]:
        """One point per (emotion, strength), all in the same batches. Strength 0 is the unsteered replies.

        Args:
            what: for the progress bar.

        Raises:
            DataError: if the judge failed on every reply of a point.
        """
        cells = [Cell(group, emotion, CIRCUIT, strength) for emotion, strength in wanted if strength for group in self.groups]
        written = iter(self._contest.write(cells, what) if cells else [])
        rows = [[next(written) for _ in self.groups] if strength else self._plain for _, strength in wanted]
        texts = [row["text"] for some in rows for row in some]
        readings, verdicts = self.jury.readings(texts, what), self.jury.verdicts(texts, what)
        prompts = [group.said for group in self.groups]
        answering = self.jury.answering([pair for replies in rows for pair in zip(prompts, _texts(replies), strict=True)], what)
        points = []
        for (emotion, strength), replies in zip(wanted, rows, strict=True):
            given = [readings[text] for text in _texts(replies)]
            shares = [reading.probabilities for reading in given]
            judged = tuple(None if share is None else float(share.get(emotion, 0.0)) for share in shares)
            if all(share is None for share in judged):
                name = self.jury.name
                raise DataError(f"the judge {name} failed on all {len(replies)} replies of {emotion} at strength {strength:g}; try again")
            dearer = [_nats(row) - _nats(plain) for row, plain in zip(replies, self._plain, strict=True)]
            sound = fmean(verdicts[row["text"]].sound for row in replies)
            names = [bool(stem_pattern(emotion).search(text)) for text in _texts(replies)]
            answers = [answering[pair] >= ANSWERED for pair in zip(prompts, _texts(replies), strict=True)]
            good = fmean(  # over the replies that a judge has read, as its probabilities are
                reading.label == emotion and verdicts[text].sound and answered and not named
                for reading, text, answered, named in zip(given, _texts(replies), answers, names, strict=True)
                if reading.probabilities is not None
            )
            ratio, error = math.exp(fmean(dearer)), standard_error(dearer)
            points.append(StrengthPoint(emotion, strength, judged, ratio, sound, fmean(names), error, good, fmean(answers)))
        return points


def _texts(replies: Sequence[Row]) -> list[str]:
    return [row["text"] for row in replies]


def _nats(reply: Row) -> float:
    """Nats per token of a reply alone under the unsteered model."""
    return EMPTY_NLL if reply["nll"] is None else float(reply["nll"])
