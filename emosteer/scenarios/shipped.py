"""The data that a stage reads: scenario-events, their reply bank and the hashes of both files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from emosteer.base.errors import DataError
from emosteer.base.files import sha256_file
from emosteer.scenarios.scenarios import Bank, Group, data_path, groups_of, read_bank, read_scenarios
from emosteer.scenarios.splits import split, spread, unread


@dataclass(frozen=True)
class Data:
    """What a stage reads: the scenario-events, the bank where one is used, and the files' hashes."""

    groups: list[Group]
    bank: Bank | None
    hashes: dict[str, str]


def read_data(scenarios: Path | None, replies: Path | None, elicitation: str = "reply", limit: int | None = None) -> Data:
    """Reads scenarios and, for the `reply` elicitation, a bank; the shipped training files by default.

    Raises:
        DataError: for whatever is wrong with them.
    """
    scenario_file = scenarios or data_path("sev/train.jsonl")
    groups = groups_of(read_scenarios(scenario_file))
    hashes = {scenario_file.name: sha256_file(scenario_file)}
    bank = None
    if elicitation == "reply":
        bank_file = replies or data_path("replies/train.jsonl")
        bank = read_bank(bank_file)
        hashes[f"replies/{bank_file.name}"] = sha256_file(bank_file)
        groups = [group for group in groups if group.key in bank]
        if not groups:
            raise DataError(
                f"no scenario-event of {scenario_file} has a reply in {bank_file}; give the bank of these scenarios with --replies"
            )
    if limit is not None and limit < len(groups):
        groups = spread(groups, limit)
    return Data(groups, bank, hashes)


def without_development(groups: list[Group], scenarios: Path | None = None) -> list[Group]:
    """The groups outside the development split (a fifth of the scenarios), on which `calibrate` and `evaluate` choose."""
    kept_back = {scenario.id for scenario in split(read_scenarios(scenarios or data_path("sev/train.jsonl")), 0.2, 0)[1]}
    return [group for group in groups if group.key.scenario not in kept_back]


def development_groups(count: int, scenarios: Path | None = None) -> tuple[list[Group], Path]:
    """Scenario-events to choose strengths on, evenly drawn, and their file: of the shipped development split, or of a file of one's own,
    which is not split."""
    file = scenarios or data_path("sev/train.jsonl")
    read = read_scenarios(file)
    return spread(groups_of(read if scenarios else split(read, 0.2, 0)[1]), count), file


def unseen_groups(count: int, skip: int = 0, scenarios: Path | None = None) -> tuple[list[Group], Path]:
    """Scenario-events that nothing was chosen on, and their file: of the shipped test set or of a file of one's own (see `unread`)."""
    file = scenarios or data_path("sev/test.jsonl")
    return unread(groups_of(read_scenarios(file)), count, skip), file
