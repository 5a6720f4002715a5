"""A bank from the model's own emotion-prompted replies that pass a filter (as the paper does, section 3.2).

For models that follow emotion prompts. The replies are asked for by `tone`, and directions are then read with the plain prompt, so
that the prompt's emotion word is not in the context. The filter is plain: what it keeps is finished, long enough, does not name the
emotion, does not repeat itself and is not the reply to another emotion of the same group word for word.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from emosteer.base.processes import ALONE, Crew
from emosteer.circuits.methods import PROMPT
from emosteer.generation.decoding import Decoding
from emosteer.models.model import Model
from emosteer.scenarios.scenarios import Bank, Group
from emosteer.scenarios.scripts import is_unspaced, word_count, words
from emosteer.scenarios.words import name_pattern
from emosteer.writing.jobs import Job
from emosteer.writing.reply_files import write_file
from emosteer.writing.settings import BATCH_SIZE
from emosteer.writing.writer import Writer

MIN_WORDS = 5


def fault(text: str, emotion: str, finish_reason: str) -> str | None:
    """Why a reply is not used, or None if it is."""
    said = words(text)
    if finish_reason != "stop":
        return "cut off"
    if (word_count(text) if is_unspaced(text) else len(said)) < MIN_WORDS:
        return "too short"
    if name_pattern(emotion).search(text):
        return "names the emotion"
    grams = [tuple(said[i : i + 3]) for i in range(len(said) - 2)]
    return "repeats itself" if len(set(grams)) < 0.7 * len(grams) else None


def own_bank(
    model: Model,
    groups: Sequence[Group],
    emotions: Sequence[str],
    out: Path,
    instruction: str,
    *,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    fresh: bool = False,
    crew: Crew = ALONE,
) -> tuple[Bank, Counter[str]]:
    """Writes (or goes on writing) the model's replies to `out` and filters them.

    Returns:
        The bank, and how many replies each reason took out.
    """
    jobs = [Job.of(group, emotion, PROMPT, None) for group in groups for emotion in emotions]
    writer = Writer(model, None, Decoding(max_new_tokens=80, seed=seed), instruction, PROMPT, batch_size)
    bank: Bank = {}
    reasons: Counter[str] = Counter()
    keys = {job.id: group.key for group in groups for job in (Job.of(group, e, PROMPT, None) for e in emotions)}
    for row in write_file(writer, jobs, out, fresh=fresh, crew=crew):
        found = fault(row["text"], row["emotion"], row["finish_reason"])
        replies = bank.setdefault(keys[row["id"]], {})
        if found is None and row["text"] in replies.values():
            found = "same as for another emotion"
        if found:
            reasons[found] += 1
        else:
            replies[row["emotion"]] = row["text"]
    return bank, reasons
