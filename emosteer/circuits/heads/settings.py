"""What shapes a run of `heads`. No torch, so that the command line can show the defaults."""

from __future__ import annotations

from dataclasses import dataclass

from emosteer.base.errors import UsageError

_BOUNDS = {"described": (1, 100), "nodes": (0, 2000), "edges": (0, 100_000), "groups": (2, 1_000_000), "texts": (1, 50)}
_BOUNDS |= {"tokens": (1, 200), "checked": (0, 10_000), "random": (2, 10_000)}


@dataclass(frozen=True)
class HeadSettings:
    """What shapes the result.

    described: the strongest heads of each emotion that get a page; nodes: the strongest heads that the graph is drawn between, 0 for no
    graph; edges: edges of each emotion that are kept, the strongest, at most; groups: prompts of the bank that are read, each with its
    replies; texts: texts on each end of what a head fires on; tokens: tokens on each end of what it writes, and those that it looks at;
    checked: edges that are also patched for real, on one text each; random: random outputs of each head that what it writes is compared
    with.
    """

    described: int = 10
    nodes: int = 40
    edges: int = 60
    groups: int = 48
    texts: int = 4
    tokens: int = 12
    checked: int = 48
    random: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        for name, (low, high) in _BOUNDS.items():
            if not low <= (found := getattr(self, name)) <= high:
                raise UsageError(f"expected --{name} from {low} to {high}, found {found}")
        if self.nodes and self.nodes < self.described:
            raise UsageError(f"expected --nodes to be 0 or at least --described ({self.described}), found {self.nodes}")
