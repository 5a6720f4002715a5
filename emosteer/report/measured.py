"""evaluation.json, checked and with names: what `evaluate` measured. No torch here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emosteer.base.errors import ArtifactError
from emosteer.base.files import read_text
from emosteer.report.wording import Interval, finite, ordered

SCHEMA = 1
_NEEDED = {"emotions": list, "results": list, "frontier": list, "comparisons": list, "model": str}


@dataclass(frozen=True)
class Measured:
    """The evaluation of one model. raw: the file's content; results: method -> its row, in the page's order of methods."""

    raw: Mapping[str, Any]
    results: Mapping[str, Mapping[str, Any]]

    @classmethod
    def load(cls, path: Path) -> Measured:
        """Reads and checks the file.

        Raises:
            ArtifactError: if it is not an evaluation.
        """
        again = "; make it again with `emosteer evaluate`"
        try:
            raw = json.loads(read_text(path, "evaluation"))
        except ValueError as error:
            raise ArtifactError(f"expected {path} to be JSON, found {error}{again}") from error
        if not isinstance(raw, dict) or raw.get("kind") != "evaluation":
            raise ArtifactError(
                f"expected {path} to be an evaluation, found {raw.get('kind') if isinstance(raw, dict) else type(raw)}{again}"
            )
        if raw.get("schema") != SCHEMA:
            raise ArtifactError(f"{path} has schema {raw.get('schema')}, this emosteer reads schema {SCHEMA}{again}")
        for name, kind in _NEEDED.items():
            if not isinstance(raw.get(name), kind):
                raise ArtifactError(f"expected '{name}' in {path} to be a {kind.__name__}, found {type(raw.get(name)).__name__}{again}")
        rows = {row["method"]: row for row in raw["results"] if isinstance(row, dict) and isinstance(row.get("method"), str)}
        return cls(raw, {method: rows[method] for method in ordered(list(rows))})

    @property
    def emotions(self) -> tuple[str, ...]:
        """The emotions asked for."""
        return tuple(self.raw["emotions"])

    @property
    def chance(self) -> float:
        """Six-way accuracy of a guess."""
        return 1 / max(1, len(self.emotions))

    @property
    def best_prompt(self) -> str | None:
        """The prompt that did best on the development split."""
        prompt = self.raw.get("best_prompt")
        return prompt if isinstance(prompt, str) else None

    def budget(self, name: str) -> float | None:
        """A limit that settings were chosen under: "ratio" or "names"."""
        return finite((self.raw.get("budget") or {}).get(name))

    def metric(self, method: str, name: str) -> Interval:
        """A method's result on the test split."""
        return Interval.of(self.results.get(method, {}).get(name))

    def part(self, method: str, by: str, name: str, metric: str) -> Interval:
        """The same for one emotion or valence; by: "by_emotion" or "by_valence"."""
        row = (self.results.get(method, {}).get(by) or {}).get(name) or {}
        return Interval.of(row.get(metric))

    def parts(self, by: str) -> list[str]:
        """The emotions or valences that any method has results for."""
        names = [name for row in self.results.values() for name in (row.get(by) or {})]
        return list(dict.fromkeys([*(e for e in self.emotions if e in names), *names]))

    def difference(self, a: str, b: str, metric: str = "accuracy") -> tuple[Interval, float | None]:
        """Paired difference a - b with its interval, and its p; empty where they were not compared."""
        for row in self.raw["comparisons"]:
            if row.get("metric") != metric or {row.get("a"), row.get("b")} != {a, b}:
                continue
            interval = Interval.of(row.get("difference"))
            return (interval if row["a"] == a else interval.negated()), finite(row.get("p"))
        return Interval(None), None

    def frontier(self) -> list[Mapping[str, Any]]:
        """Points of the development split over all emotions, whole ones only."""
        rows = [row for row in self.raw["frontier"] if row.get("emotion", "all") == "all"]
        return [row for row in rows if finite(row.get("accuracy")) is not None and (finite(row.get("ratio")) or 0) > 0]

    def equal_ratio(self, a: str, b: str) -> Mapping[str, Any] | None:
        """The comparison of two methods where their perplexity ratios are nearest, on the development split."""
        rows = self.raw.get("equal_ratio") or ()
        return next((row for row in rows if row.get("a") == a and row.get("b") == b), None)

    def size(self, split: str) -> int | None:
        """Scenario-events of a split."""
        n_groups = (self.raw.get(split) or {}).get("n_groups")
        return n_groups if isinstance(n_groups, int) else None
