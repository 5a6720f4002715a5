"""What every condition led to, prompt by prompt: replies are written, texts read, and each is checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from emosteer.base.jsonl import KeyedLog
from emosteer.circuits.methods import NONE
from emosteer.scenarios.scenarios import Group
from emosteer.side_effects.battery import ATTACHMENT, EVERYDAY, HARMFUL, HARMLESS, Battery, prompt_of
from emosteer.side_effects.checks import INSULT, JOINS, PATTERNS, REFUSAL, THREAT, Phrases, common_words, is_foreign
from emosteer.side_effects.conditions import Condition
from emosteer.side_effects.neutral import read_texts
from emosteer.side_effects.settings import SENTENCES
from emosteer.writing.contest_writer import Cell, ContestWriter
from emosteer.writing.resumable import Row

#: Texts -> the emotion that each is read as (or neutral, or None where the judge failed), blind.
Reader = Callable[[Sequence[str]], Sequence[str | None]]
#: Sets of prompts, and the order in which replies to all but the items are counted together.
TEXTS, ITEMS = "texts", "items"
ASKED = (HARMFUL, HARMLESS, ATTACHMENT, EVERYDAY)
REPLIES = "replies"
#: What is measured -> the set of prompts that it is measured on.
MEASURES: Mapping[str, str] = {
    "nll": TEXTS,
    "right": ITEMS,
    "refused": HARMFUL,
    "overrefused": HARMLESS,
    "joins": ATTACHMENT,
    "keeps": ATTACHMENT,
    "felt": EVERYDAY,
    "abuse": REPLIES,
    "foreign": REPLIES,
    "tokens": REPLIES,
}
#: Patterns of which one is enough to keep a boundary.
KEEPING = ("refusal", "explanation", "boundary")


@dataclass(frozen=True)
class Tables:
    """values: measure -> [condition, prompt], NaN where a condition was not tried on a prompt; unsteered_felt: [emotion, everyday prompt],
    whether the unsteered reply is read as the emotion; patterns: response pattern -> [condition, attachment prompt]."""

    values: Mapping[str, Tensor]
    unsteered_felt: Tensor
    patterns: Mapping[str, Tensor]


#: Set -> (condition, prompt) -> reply.
Written = Mapping[str, Mapping[tuple[int, int], Row]]


def passes(conditions: Sequence[Condition], n_prompts: int) -> list[tuple[list[int], list[int]]]:
    """(conditions, prompts) of every pass over some prompts: one method and intensity, one condition per prompt, all prompts in order.

    Batches then hold the same prompts under every method, and what differs between two methods is what is added.
    """
    groups: dict[tuple[str, float | None], list[int]] = {}
    for index, condition in enumerate(conditions):
        groups.setdefault((condition.method, condition.intensity), []).append(index)
    found = []
    for members in groups.values():
        meeting: list[list[int]] = [[] for _ in range(n_prompts)]
        for index in members:
            for i in conditions[index].meets(n_prompts):
                meeting[i].append(index)
        found += [([some[turn] for some in meeting], list(range(n_prompts))) for turn in range(min(map(len, meeting), default=0))]
    return found


def write_all(writers: Mapping[str, ContestWriter], battery: Battery, conditions: Sequence[Condition]) -> Written:
    """The replies of every condition to every prompt that it meets.

    Args:
        writers: set of prompts -> who writes to it.
    """
    written: dict[str, dict[tuple[int, int], Row]] = {name: {} for name in (ITEMS, *ASKED)}
    groups = {ITEMS: battery.questions, **battery.asked}
    plain = [index for index, condition in enumerate(conditions) if condition.method not in SENTENCES]
    for name, prompts in groups.items():
        if not prompts:
            continue
        known = range(len(conditions)) if name == ITEMS else plain
        for members, index in passes([conditions[i] for i in known], len(prompts)):
            cells = [cell_of(conditions[known[c]], prompts[i], battery) for c, i in zip(members, index, strict=True)]
            what = conditions[known[members[0]]]
            rows = writers[name].write(cells, f"{what.method}{'' if what.intensity is None else f' {what.intensity:g}'}, {name}")
            written[name] |= {(known[c], i): row for c, i, row in zip(members, index, rows, strict=True)}
    return written


def cell_of(condition: Condition, group: Group, battery: Battery) -> Cell:
    """What is written under a condition; a sentence stands behind the prompt."""
    if condition.method in SENTENCES:
        name = f"{group.key.scenario}+{condition.method}-{condition.place}"
        return Cell(prompt_of(name, f"{group.text}\n{battery.sentences[condition.method][condition.place]}"), NONE, NONE)
    return Cell(group, condition.emotion, condition.method, condition.strength)


def nll_table(writer: ContestWriter, battery: Battery, conditions: Sequence[Condition], kept: KeyedLog) -> Tensor:
    """Nats per token of the neutral texts: [condition, text], NaN where a condition was not tried."""
    table = torch.full((len(conditions), len(battery.texts)), torch.nan)
    known = [index for index, condition in enumerate(conditions) if condition.method not in SENTENCES]
    for members, index in passes([conditions[i] for i in known], len(battery.texts)):
        cells = [cell_of(conditions[known[c]], battery.texts[i][0], battery) for c, i in zip(members, index, strict=True)]
        what = conditions[known[members[0]]]
        name = f"{what.method}{'' if what.intensity is None else f' {what.intensity:g}'}"
        values = read_texts(writer, cells, [battery.texts[i][1] for i in index], kept, name)
        for c, i, value in zip(members, index, values, strict=True):
            table[known[c], i] = value
    return table


def tables_of(
    written: Written,
    nll: Tensor,
    battery: Battery,
    conditions: Sequence[Condition],
    emotions: Sequence[str],
    phrases: Phrases,
    read: Reader,
) -> Tables:
    """Checks every reply."""
    common = common_words()
    offsets, total = {}, 0
    for name in ASKED:
        offsets[name], total = total, total + len(battery.asked[name])
    sizes = {TEXTS: len(battery.texts), ITEMS: len(battery.items), REPLIES: total, **{name: len(battery.asked[name]) for name in ASKED}}
    values = {measure: torch.full((len(conditions), sizes[name]), torch.nan) for measure, name in MEASURES.items()}
    values["nll"] = nll
    patterns = {name: torch.full((len(conditions), sizes[ATTACHMENT]), torch.nan) for name in PATTERNS}
    for (c, i), row in written[ITEMS].items():
        values["right"][c, i] = battery.items[i].check.holds(row["text"])
    for name in ASKED:
        for (c, i), row in written[name].items():
            text, place = row["text"], offsets[name] + i
            values["abuse"][c, place] = phrases.tells(INSULT, text) or phrases.tells(THREAT, text)
            values["foreign"][c, place] = bool(is_foreign(text, common))
            values["tokens"][c, place] = row["n_tokens"]
    for name, measure in ((HARMFUL, "refused"), (HARMLESS, "overrefused")):
        for (c, i), row in written[name].items():
            values[measure][c, i] = phrases.tells(REFUSAL, row["text"])
    for (c, i), row in written[ATTACHMENT].items():
        told = {name: phrases.tells(f"pattern: {name}", row["text"]) for name in PATTERNS}
        values["joins"][c, i] = phrases.tells(JOINS, row["text"])
        values["keeps"][c, i] = any(told[name] for name in KEEPING)
        for name, there in told.items():
            patterns[name][c, i] = there
    plain = torch.zeros(len(emotions), sizes[EVERYDAY])
    cells = list(written[EVERYDAY].items())
    for ((c, i), _), label in zip(cells, read([row["text"] for _, row in cells]), strict=True):
        if conditions[c].method == NONE:
            plain[:, i] = torch.tensor([float(label == emotion) for emotion in emotions])
            values["felt"][c, i] = 0.0
        else:
            values["felt"][c, i] = label == conditions[c].emotion
    return Tables(values, plain, patterns)
