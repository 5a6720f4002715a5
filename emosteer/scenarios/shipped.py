"""The data that a stage reads: scenario-events, their reply bank and the hashes of both files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emosteer.base.errors import DataError
from emosteer.base.files import sha256_file
from emosteer.scenarios.emotions import EMOTIONS
from emosteer.scenarios.prompt_sets import KINDS, of_kinds, read_events, read_groups
from emosteer.scenarios.scenarios import Bank, Group, data_path, groups_of, read_bank, read_scenarios
from emosteer.scenarios.splits import split, spread, unread

#: What directions and circuits are made from where nobody names data: prompts, and their reply bank.
TRAIN, BANK = "prompts/train.jsonl", "replies/plain.jsonl"
#: Replies in further emotions (trust, anticipation, love) to some of the same prompts.
MORE = "replies/more.jsonl"


@dataclass(frozen=True)
class Data:
    """What a stage reads: the scenario-events, the bank where one is used, and the files' hashes."""

    groups: list[Group]
    bank: Bank | None
    hashes: dict[str, str]


def read_data(
    scenarios: Path | None,
    replies: Path | None,
    elicitation: str = "reply",
    limit: int | None = None,
    emotions: Sequence[str] = EMOTIONS,
) -> Data:
    """Reads scenarios and, for the `reply` elicitation, a bank; the shipped training files by default.

    Args:
        limit: use this many scenario-events, evenly spread; emotions: that are wanted. Where the default bank lacks some that
            `replies/more.jsonl` holds, both are read, and only the prompts that have all of them are kept, so that every emotion is told
            from the others on the same prompts.

    Raises:
        DataError: for whatever is wrong with them.
    """
    scenario_file = scenarios or data_path(TRAIN)
    groups = read_groups(scenario_file)
    hashes = {scenario_file.name: sha256_file(scenario_file)}
    bank = None
    if elicitation == "reply":
        bank_file = replies or data_path(BANK)
        bank = read_bank(bank_file)
        hashes[f"replies/{bank_file.name}"] = sha256_file(bank_file)
        if replies is None and (more := _more(bank, emotions)) is not None:
            bank, hashes[MORE] = more, sha256_file(data_path(MORE))
        groups = [group for group in groups if group.key in bank]
        if not groups:
            raise DataError(
                f"no scenario-event of {scenario_file} has a reply in {bank_file}; give the bank of these scenarios with --replies"
            )
    if limit is not None and limit < len(groups):
        groups = spread(groups, limit)
    return Data(groups, bank, hashes)


def _more(bank: Bank, emotions: Sequence[str]) -> Bank | None:
    """The default bank with the shipped replies in further emotions, at the prompts that have all that is wanted of both; None where
    these hold nothing that is wanted."""
    lacking = set(emotions) - {emotion for replies in bank.values() for emotion in replies}
    if not lacking:
        return None
    more = read_bank(data_path(MORE))
    added = lacking & {emotion for replies in more.values() for emotion in replies}
    if not added:
        return None
    both = {key: {**bank.get(key, {}), **replies} for key, replies in more.items()}
    wanted = {emotion for emotion in emotions if emotion in added or emotion not in lacking}
    return {key: replies for key, replies in both.items() if wanted <= replies.keys()}


def without_development(groups: list[Group], scenarios: Path | None = None) -> list[Group]:
    """The groups outside the development split (a fifth of the scenarios), on which `calibrate` and `evaluate` choose. Prompts of other
    kinds have a development set of their own."""
    if not any(group.key.valence for group in groups):
        return groups
    kept_back = {scenario.id for scenario in split(read_events(scenarios or data_path("sev/train.jsonl")), 0.2, 0)[1]}
    return [group for group in groups if group.key.scenario not in kept_back]


@dataclass(frozen=True)
class PromptSet:
    """Prompts that are written to, and the files that they are from."""

    groups: list[Group]
    files: tuple[Path, ...]

    def described(self) -> dict[str, Any]:
        """How many, of which kinds, and the files with their hashes: what results keep."""
        kinds = Counter(group.kind for group in self.groups)
        return {"n_groups": len(self.groups), "kinds": dict(kinds), "files": self.hashes}

    @property
    def hashes(self) -> dict[str, str]:
        """File's name, with that of its folder where there is one -> sha256."""
        return {Path(*file.parts[-2:]).as_posix(): sha256_file(file) for file in self.files}


def development_groups(count: int, scenarios: Path | None = None, kinds: Sequence[str] = KINDS) -> PromptSet:
    """Prompts to choose strengths on, evenly drawn from the kinds: the shipped ones (the development split of the training scenarios, and
    prompts of the other kinds), or those of a file of one's own, which is not split."""
    if scenarios is not None:
        sources = {scenarios: read_groups(scenarios)}
    else:
        train, prompts = data_path("sev/train.jsonl"), data_path("prompts/dev.jsonl")
        sources = {train: groups_of(split(read_scenarios(train), 0.2, 0)[1]), prompts: read_groups(prompts)}
    return _set(of_kinds([group for groups in sources.values() for group in groups], kinds, count), sources, kinds)


def unseen_groups(count: int, skip: int = 0, scenarios: Path | None = None, kinds: Sequence[str] = KINDS) -> PromptSet:
    """Prompts that nothing was chosen on, evenly drawn from the kinds: of the shipped test sets or of a file of one's own.

    Args:
        count: how many, 0 is all; skip: how many of each kind are left out, because they were read before (see `unread`).
    """
    files = (scenarios,) if scenarios is not None else (data_path("sev/test.jsonl"), data_path("prompts/test.jsonl"))
    sources = {file: read_groups(file) for file in files}
    by_kind = [[group for groups in sources.values() for group in groups if group.kind == kind] for kind in kinds]
    present = [members for members in by_kind if members]
    each = max(1, count // max(1, len(present))) if count else 0
    return _set([group for members in present for group in unread(members, each, skip)], sources, kinds)


def _set(drawn: list[Group], sources: Mapping[Path, Sequence[Group]], kinds: Sequence[str]) -> PromptSet:
    """The prompts with those of the files that they are from; a DataError where there are none."""
    if not drawn:
        raise DataError(f"{[*sources][-1]} has no prompt of the kinds {', '.join(kinds)}; choose others with --kinds")
    chosen = {group.key for group in drawn}
    return PromptSet(drawn, tuple(file for file, groups in sources.items() if any(group.key in chosen for group in groups)))
