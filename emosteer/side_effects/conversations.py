"""What several turns tell: wrong answers that are told to be wrong, and emotions after a long conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from emosteer.circuits.methods import CIRCUIT, NONE
from emosteer.scenarios.scenarios import Group, Message
from emosteer.side_effects.battery import EVERYDAY, Battery, evenly, prompt_of
from emosteer.side_effects.outcomes import Reader
from emosteer.writing.contest_writer import Cell, ContestWriter

#: How an emotion is had after a long conversation: by steering now, by having been asked for at its beginning, not at all.
STEERED, REQUESTED, UNTOLD = "circuit", "asked for at the beginning", "unsteered"
#: What stands for a reply without text in the conversation that goes on.
_SILENCE = "..."


def continued(name: str, earlier: Sequence[tuple[str, str]], text: str) -> Group:
    """A last turn after others. earlier: (role, content) of each."""
    return replace(prompt_of(name, text), earlier=tuple(Message(*turn) for turn in earlier))


def second_chances(
    writer: ContestWriter, battery: Battery, first: Mapping[int, str], arms: Mapping[str, Sequence[str]], rounds: int
) -> dict[str, Tensor]:
    """Wrong answers are told to be wrong, in the tone of an arm, and given again, up to so many times.

    Args:
        first: item -> its unsteered reply; arms: name -> what is said in each round.

    Returns:
        arm -> [round + 1, item], whether the item was right by then; the first row is before any feedback.
    """
    found = {}
    for arm, said in arms.items():
        right = torch.zeros(rounds + 1, len(battery.items))
        right[0] = torch.tensor([battery.items[i].check.holds(first[i]) for i in range(len(battery.items))])
        earlier: dict[int, tuple[tuple[str, str], ...]]
        earlier = {i: (("user", battery.items[i].prompt), ("assistant", first[i] or _SILENCE)) for i in first if not right[0, i]}
        for turn in range(rounds):
            wrong = [i for i in earlier if not right[turn, i]]
            right[turn + 1] = right[turn]
            cells = [Cell(continued(f"{battery.items[i].id}+{arm}-{turn}", earlier[i], said[turn]), NONE, NONE) for i in wrong]
            for i, row in zip(wrong, writer.write(cells, f"{arm} feedback {turn + 1}") if cells else (), strict=True):
                right[turn + 1, i] = battery.items[i].check.holds(row["text"])
                earlier[i] = (*earlier[i], ("user", said[turn]), ("assistant", row["text"] or _SILENCE))
        found[arm] = right
    return found


@dataclass(frozen=True)
class After:
    """Replies after a long conversation. hits: by prompt, 1 where the reply is read as the emotion."""

    how: str
    distance: int
    emotion: str
    hits: tuple[int, ...]


def after_long_talk(
    writer: ContestWriter, battery: Battery, strengths: Mapping[str, float], distances: Sequence[int], count: int, read: Reader
) -> tuple[list[After], list[int]]:
    """Replies at the end of a conversation that begins with a request, goes on neutrally for so many tokens, and ends with a prompt.

    Args:
        strengths: emotion -> strength of the circuit; count: prompts.

    Returns:
        What was read, and the distances that the model's context does not bear.
    """
    prompts = evenly([group for group in battery.asked[EVERYDAY] if not group.earlier], count)
    found: list[After] = []
    beyond = []
    for distance in distances:
        wanted = _endings(prompts, strengths, distance, neutral_talk(writer, battery, distance))
        cells = [cell for some in wanted.values() for cell in some]
        longest = max((len(writer.request(cell).ids) for cell in cells), default=0)
        if longest + writer.decoding.max_new_tokens > writer.model.shape.context:
            beyond.append(distance)
            continue
        labels = iter(read([row["text"] for row in writer.write(cells, f"after {distance} tokens")]))
        told = {key: [next(labels) for _ in some] for key, some in wanted.items()}
        for emotion in strengths:
            for how in (STEERED, REQUESTED, UNTOLD):
                own = told[how, "" if how == UNTOLD else emotion]
                found.append(After(how, distance, emotion, tuple(int(label == emotion) for label in own)))
    return found, beyond


def _endings(
    prompts: Sequence[Group], strengths: Mapping[str, float], distance: int, talk: Sequence[tuple[str, str]]
) -> dict[tuple[str, str], list[Cell]]:
    """(how, emotion) -> the last turns to be answered; the emotion is "" where none is wanted."""

    def turns(how: str, wish: str) -> list[Group]:
        opening = (("user", f"Until we stop talking, reply {wish}."), ("assistant", "All right, I will."))
        return [continued(f"{group.key}+after-{distance}-{how}", (*opening, *talk), group.text) for group in prompts]

    usual = turns("usual", "as you usually do")
    found = {(STEERED, emotion): [Cell(there, emotion, CIRCUIT, strength) for there in usual] for emotion, strength in strengths.items()}
    for emotion in strengths:
        wished = turns(f"asked-{emotion}", f"in a tone of strong {emotion}")
        found[REQUESTED, emotion] = [Cell(there, NONE, NONE) for there in wished]
    found[UNTOLD, ""] = [Cell(there, NONE, NONE) for there in usual]
    return found


def neutral_talk(writer: ContestWriter, battery: Battery, tokens: int) -> list[tuple[str, str]]:
    """Turns of neutral conversation, of as many tokens as asked for or a turn more: prompts of the bank with their neutral replies."""
    turns: list[tuple[str, str]] = []
    pairs = [(group.text, reply) for group, reply in battery.texts if not group.earlier]
    number = length = 0
    while length < tokens and pairs:
        text, reply = pairs[number % len(pairs)]
        turns += [("user", text), ("assistant", reply)]
        length += len(writer.model.text_ids(text)) + len(writer.model.text_ids(reply))
        number += 1
    return turns
