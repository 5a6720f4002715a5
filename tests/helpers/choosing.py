"""A chooser by rule, for tests of whatever writes the best of several replies."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from emosteer.judges.choosing.chooser import Chooser


@dataclass
class ByRule:
    """Chooses by a rule of the text; notes what it was shown."""

    rule: Callable[[str], Any]
    key: str = "by rule"
    shown: list[tuple[str, str, tuple[str, ...]]] = field(default_factory=list)

    def chances(self, pairs: Sequence[tuple[str, str]], wanted: Sequence[Collection[str]]) -> torch.Tensor:
        self.shown += [(said, reply, tuple(names)) for (said, reply), names in zip(pairs, wanted, strict=True)]
        return torch.tensor([float(self.rule(reply)) for _, reply in pairs])


def choose_by(monkeypatch: pytest.MonkeyPatch, rule: Callable[[str], Any] = len) -> ByRule:
    """Lets a rule choose wherever the shipped chooser would be loaded."""
    chooser = ByRule(rule)
    monkeypatch.setattr(Chooser, "load", lambda *_: chooser)
    return chooser
