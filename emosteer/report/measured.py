"""evaluation.json, checked and with names: what `evaluate` measured. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emosteer.base.errors import ArtifactError
from emosteer.base.files import read_text
from emosteer.base.strict_json import loads
from emosteer.circuits.methods import CIRCUIT
from emosteer.report.wording import Interval, finite, ordered

SCHEMA = 2
#: Why a file that an earlier version wrote is left out.
EARLIER = "made by an earlier version; run `emosteer evaluate` again"
_NEEDED = {"emotions": list, "results": list, "frontier": list, "comparisons": list, "model": str}


class OutdatedError(ArtifactError):
    """A file of the contest that an earlier version made: it is left out, and the rest goes on without it."""


@dataclass(frozen=True)
class Measured:
    """The evaluation of one model. raw: the file's content; results: method -> its row, in the page's order of methods."""

    raw: Mapping[str, Any]
    results: Mapping[str, Mapping[str, Any]]

    @classmethod
    def load(cls, path: Path) -> Measured:
        """Reads and checks the file.

        Raises:
            OutdatedError: if an earlier version made it. ArtifactError: if it is not an evaluation.
        """
        again = "; make it again with `emosteer evaluate`"
        try:
            raw = loads(read_text(path, "evaluation"))
        except ValueError as error:
            raise ArtifactError(f"expected {path} to be JSON, found {error}{again}") from error
        if not isinstance(raw, dict) or raw.get("kind") != "evaluation":
            raise ArtifactError(
                f"expected {path} to be an evaluation, found {raw.get('kind') if isinstance(raw, dict) else type(raw)}{again}"
            )
        schema = raw.get("schema")
        if isinstance(schema, int) and schema < SCHEMA:
            raise OutdatedError(f"expected {path} to have schema {SCHEMA}, found {schema}: {EARLIER}")
        if schema != SCHEMA:
            raise ArtifactError(f"{path} has schema {schema}, this emosteer reads schema {SCHEMA}{again}")
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
        """Six-way accuracy of a guess. Other shares have no such line: whoever guesses may say neutral."""
        return 1 / max(1, len(self.emotions))

    @property
    def best_prompt(self) -> str | None:
        """The prompt that did best on the development split."""
        prompt = self.raw.get("best_prompt")
        return prompt if isinstance(prompt, str) else None

    def budget(self, name: str) -> float | None:
        """A limit that settings were chosen under: "ratio", "names" or "sound"."""
        return finite((self.raw.get("budget") or {}).get(name))

    def metric(self, method: str, name: str) -> Interval:
        """A method's result on the test split."""
        return Interval.of(self.results.get(method, {}).get(name))

    def part(self, method: str, by: str, name: str, metric: str) -> Interval:
        """The same for one emotion, kind of prompt or valence; by: "by_emotion", "by_kind" or "by_valence"."""
        row = (self.results.get(method, {}).get(by) or {}).get(name) or {}
        return Interval.of(row.get(metric))

    def parts(self, by: str) -> list[str]:
        """The emotions, kinds or valences that any method has results for; kinds of prompt with the worst first."""
        names = [name for row in self.results.values() for name in (row.get(by) or {})]
        known = list(dict.fromkeys([*(e for e in self.emotions if e in names), *names]))
        return sorted(known, key=lambda kind: self.part(self.leading, by, kind, "good").value or 0.0) if by == "by_kind" else known

    @property
    def leading(self) -> str:
        """The method that kinds of prompt are sorted by: the circuit, or the one with the most good replies."""
        return CIRCUIT if CIRCUIT in self.results else max(self.results, key=lambda m: self.metric(m, "good").value or 0.0, default="")

    def worst_kind(self, method: str) -> str | None:
        """The kind of prompt that a method has the fewest good replies to; None where prompts were not told apart."""
        worst = self.results.get(method, {}).get("worst_kind")
        return worst if isinstance(worst, str) and worst in (self.results[method].get("by_kind") or {}) else None

    @property
    def agreement(self) -> Mapping[str, Any]:
        """How far the judges agree: "judges", "alpha", "pairs", "undecided", "n"; empty where it was not measured."""
        found = self.raw.get("agreement")
        return found if isinstance(found, Mapping) else {}

    @property
    def judges(self) -> list[str]:
        """The judges' names."""
        names = [name for row in self.results.values() for name in (row.get("judges") or {})]
        return list(dict.fromkeys([*(self.agreement.get("judges") or ()), *names]))

    def judge_share(self, method: str, judge: str) -> float | None:
        """Share of a method's replies in which one judge alone reads the emotion asked for."""
        return finite((self.results.get(method, {}).get("judges") or {}).get(judge))

    def contamination(self, method: str) -> Mapping[str, Any] | None:
        """How far the subject of a method's replies gives their emotion away; None where it was not measured."""
        found = self.results.get(method, {}).get("contamination")
        return found if isinstance(found, Mapping) else None

    def difference(self, a: str, b: str, metric: str = "good") -> tuple[Interval, float | None]:
        """Paired difference a - b with its interval, and its p; empty where they were not compared."""
        for row in self.raw["comparisons"]:
            if row.get("metric") != metric or {row.get("a"), row.get("b")} != {a, b}:
                continue
            interval = Interval.of(row.get("difference"))
            return (interval if row["a"] == a else interval.negated()), finite(row.get("p"))
        return Interval(None), None

    def frontier(self) -> list[Mapping[str, Any]]:
        """Points of the development split over all emotions, whole ones only."""
        rows = [row for row in self.raw["frontier"] if row.get("target") == "all"]
        return [row for row in rows if finite(row.get("good")) is not None and (finite(row.get("ratio")) or 0) > 0]

    def equal_ratio(self, a: str, b: str) -> Mapping[str, Any] | None:
        """The comparison of two methods where their perplexity ratios are nearest, on the development split."""
        rows = self.raw.get("equal_ratio") or ()
        return next((row for row in rows if row.get("a") == a and row.get("b") == b), None)

    def size(self, split: str) -> int | None:
        """Prompts of a split."""
        n_groups = (self.raw.get(split) or {}).get("n_groups")
        return n_groups if isinstance(n_groups, int) else None
