"""Prompts answered twice, unsteered and with an emotion, and read by a jury: what the demo and the gallery show. No torch at import."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from emosteer.circuits.methods import CIRCUIT, NONE
from emosteer.judges.pairs import Marked, Pair
from emosteer.scenarios.scenarios import Group, Message

if TYPE_CHECKING:
    from emosteer.api.steered_model import SteeredModel
    from emosteer.generation.generate import Reply
    from emosteer.judges.jury import Jury


def in_turn(groups: Sequence[Group], emotions: Sequence[str]) -> list[tuple[Group, str]]:
    """Every prompt with one emotion, which take turns, so that nobody chooses who answers what."""
    return [(group, emotions[i % len(emotions)]) for i, group in enumerate(groups)]


def pairs_of(model: SteeredModel, jury: Jury, asked: Sequence[tuple[Group, str]], max_new_tokens: int) -> list[Pair]:
    """Writes both replies to each prompt in one batch, greedily and with the defaults of `generate`, and has them read.

    Raises:
        ArtifactError: if the model has no circuit. UsageError: if the circuit does not know an emotion.
    """
    circuit = model.circuit
    turns = [(*group.earlier, Message("user", group.text)) for group, _ in asked]
    said = [[turn._asdict() for turn in one] for one in turns]
    wanted: list[str | None] = [emotion for _, emotion in asked]
    replies = model.generate([*said, *said], [None] * len(asked) + wanted, max_new_tokens=max_new_tokens)
    halves = replies[: len(asked)], replies[len(asked) :]
    plain, steered = (_marked(jury, asked, half, method) for half, method in zip(halves, (NONE, CIRCUIT), strict=True))
    assert circuit is not None  # or `generate` would have refused
    return [
        Pair(str(group.key), group.kind, said_so, emotion, circuit.default_strength(emotion), before, after)
        for (group, emotion), said_so, before, after in zip(asked, turns, plain, steered, strict=True)
    ]


def _marked(jury: Jury, asked: Sequence[tuple[Group, str]], replies: Sequence[Reply], method: str) -> list[Marked]:
    from emosteer.evaluation.metrics import measure

    texts = [reply.text for reply in replies]
    readings, verdicts = jury.readings(texts, method), jury.verdicts(texts, method)
    prompts = [(group.said, text) for (group, _), text in zip(asked, texts, strict=True)]
    answering = jury.answering(prompts, method)
    marked = []
    for (_, emotion), reply, pair in zip(asked, replies, prompts, strict=True):
        reading = readings[reply.text]
        row: dict[str, Any] = {"text": reply.text, "finish_reason": reply.finish_reason, "n_tokens": reply.n_tokens, "nll": None}
        row |= {"probabilities": reading.probabilities, "judged": reading.label, "answers": answering[pair]}
        found = measure(row | {"sound": verdicts[reply.text].sound}, emotion, (emotion,))
        marks = {name: found[name] == 1.0 for name in ("sound", "answers", "names", "good")}
        marked.append(Marked(reply.text, reading.label, **marks))
    return marked
