"""Splits and draws of scenario-events that depend on a seed alone. No torch here."""

from __future__ import annotations

import hashlib
import math
import random
from collections import defaultdict
from collections.abc import Sequence

from emosteer.base.errors import UsageError
from emosteer.scenarios.scenarios import Group, Scenario


def split(scenarios: Sequence[Scenario], test_share: float, seed: int) -> tuple[list[Scenario], list[Scenario]]:
    """Splits by whole scenarios, with each theme's share kept; the same seed gives the same split.

    Raises:
        UsageError: if the share is not between 0 and 1 or would leave a side empty.
    """
    if not 0 < test_share < 1:
        raise UsageError(f"expected a test share between 0 and 1, found {test_share}")
    themes: dict[str, list[Scenario]] = defaultdict(list)
    for scenario in scenarios:
        themes[scenario.theme].append(scenario)
    order = sorted(themes)
    random.Random(f"{seed}").shuffle(order)
    chosen: set[str] = set()
    wanted = 0.0
    for theme in order:
        members = sorted(themes[theme], key=lambda s: s.id)
        random.Random(f"{seed}/{theme}").shuffle(members)
        wanted += len(members) * test_share
        # What one theme rounds off goes to the next: themes of one scenario each are split too, and the total is right.
        chosen.update(s.id for s in members[: max(0, math.floor(wanted + 0.5) - len(chosen))])
    train, test = [s for s in scenarios if s.id not in chosen], [s for s in scenarios if s.id in chosen]
    if not train or not test:
        raise UsageError(f"a test share of {test_share} leaves one side of {len(scenarios)} scenarios empty")
    return train, test


def stable_share(key: str, seed: int) -> float:
    """A number in [0, 1) that depends on the key and the seed alone: which half or fold something falls into."""
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def spread(groups: Sequence[Group], count: int, seed: int = 0) -> list[Group]:
    """Some of the groups, drawn evenly over scenarios and valences; the same seed gives the same draw, a larger count a superset.

    A fixed stride would not do: valences come in threes, and a stride of a multiple of three would pick one of them only.
    """
    return sorted(groups, key=lambda group: stable_share(f"spread/{group.key}/{group.text}", seed))[:count]


def unread(groups: Sequence[Group], count: int, skip: int = 0) -> list[Group]:
    """Test groups from the end of a fixed order (the first 40 of the shipped ones were looked at while the method was developed).

    Args:
        count: how many; 0 is all. skip: how many at the end are left out, because they were read before.

    Raises:
        UsageError: if nothing is left.
    """
    order = sorted(groups, key=lambda group: stable_share(str(group.key), 1))
    left = order[: max(0, len(order) - skip)]
    if not left:
        raise UsageError(f"--skip {skip} leaves nothing of {len(order)} prompts")
    return left[-count:] if count else left
