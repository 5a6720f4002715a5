"""Labelled texts, and which of them are fitted on, chosen on and tested on. No torch here."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emosteer.base.errors import DataError
from emosteer.base.files import read_jsonl, sha256_file
from emosteer.probing.settings import ProbeSettings
from emosteer.scenarios.emotions import label_of
from emosteer.scenarios.scenarios import text_field
from emosteer.scenarios.shipped import read_data
from emosteer.scenarios.splits import stable_share

#: The fold of the test texts.
TEST = -1
SEVERAL, REPEATED, NOT_DRAWN = "several labels", "repeated", "over the number per label"


@dataclass(frozen=True)
class LabelledText:
    """One text. group: what it shares with others (its prompt); a group is never fitted on and tested with at the same time."""

    text: str
    label: str
    group: str


@dataclass(frozen=True)
class Texts:
    """The texts of a run in the order in which they are read, which mixes the labels.

    folds: per text the fold of the cross-validation that holds it out, or `TEST`; left_out: reason -> how many; hashes: file -> sha256.
    """

    labels: tuple[str, ...]
    texts: tuple[LabelledText, ...]
    folds: tuple[int, ...]
    left_out: Mapping[str, int]
    hashes: Mapping[str, str]

    @property
    def numbers(self) -> list[int]:
        """Per text the number of its label."""
        return [self.labels.index(text.label) for text in self.texts]

    @property
    def test(self) -> list[int]:
        """Which texts are tested on."""
        return [i for i, fold in enumerate(self.folds) if fold == TEST]

    @property
    def train(self) -> list[int]:
        """Which texts are fitted on."""
        return [i for i, fold in enumerate(self.folds) if fold != TEST]

    def some(self, chosen: Sequence[int], per_label: int) -> list[int]:
        """So many of the chosen texts for each label, at most, in order."""
        taken = Counter[str]()
        kept = []
        for i in chosen:
            taken[self.texts[i].label] += 1
            kept += [i] if taken[self.texts[i].label] <= per_label else []
        return kept


def read_texts(path: Path) -> tuple[list[LabelledText], Counter[str]]:
    """The texts of a JSON-lines file whose lines hold "text" and "label", or "labels", of which there must be one to count.

    Returns:
        The texts, and how many were left out for what reason.

    Raises:
        DataError: naming the line.
    """
    found: dict[str, LabelledText] = {}
    left_out = Counter[str]()
    for number, row in read_jsonl(path, "file of labelled texts"):
        where = f"{path}:{number}"
        text, label = text_field(row.get("text"), "text", where), _label(row, where)
        key = " ".join(text.casefold().split())
        if label is None or key in found:
            left_out[REPEATED if label else SEVERAL] += 1
            continue
        found[key] = LabelledText(text, label, key)
    return list(found.values()), left_out


def _label(row: Mapping[str, Any], where: str) -> str | None:
    """A line's one label; None where it has several."""
    several = row.get("labels")
    if "label" in row or several is None:
        return label_of(text_field(row.get("label"), "label", where), where)
    if not isinstance(several, list) or not several:
        raise DataError(f"{where}: expected 'labels' to be a list of labels, found {type(several).__name__}; give each text a 'label'")
    named = {label_of(text_field(label, "labels", where), where) for label in several}
    return named.pop() if len(named) == 1 else None


def own_texts(scenarios: Path | None = None, replies: Path | None = None) -> tuple[list[LabelledText], dict[str, str]]:
    """The replies of a bank, labelled with their emotion; the replies to one scenario are a group. The shipped bank by default.

    Returns:
        The texts, and the files' hashes.
    """
    data = read_data(scenarios, replies)
    assert data.bank is not None
    texts = [LabelledText(reply, emotion, group.key.scenario) for group in data.groups for emotion, reply in data.bank[group.key].items()]
    return texts, data.hashes


def arranged(
    found: Sequence[LabelledText],
    per_label: int,
    test_share: float,
    folds: int,
    seed: int,
    left_out: Mapping[str, int] | None = None,
    hashes: Mapping[str, str] | None = None,
) -> Texts:
    """Draws equally many texts of each label as far as there are, and splits them by groups. All of it depends on texts and seed alone.

    Raises:
        DataError: if there are fewer than two labels, or a label has too few texts for the folds and the test.
    """
    by_label: dict[str, list[LabelledText]] = defaultdict(list)
    for text in sorted(found, key=lambda text: stable_share(f"probe/{text.group}/{text.label}/{text.text}", seed)):
        by_label[text.label].append(text)
    if len(by_label) < 2:
        raise DataError(f"expected texts of at least two labels, found {', '.join(by_label) or 'none'}; give texts of several labels")
    drawn = [text for texts in by_label.values() for text in texts[:per_label]]
    drawn.sort(key=lambda text: stable_share(f"probe order/{text.group}/{text.label}/{text.text}", seed))
    place = {text.group: _fold(text.group, test_share, folds, seed) for text in drawn}
    fold_of = tuple(place[text.group] for text in drawn)
    held = Counter((text.label, fold) for text, fold in zip(drawn, fold_of, strict=True))
    for label in sorted(by_label):
        if lacking := [fold for fold in (TEST, *range(folds)) if not held[label, fold]]:
            what = "to test with" if lacking[0] == TEST else f"in fold {lacking[0] + 1} of {folds}"
            raise DataError(f"the label '{label}' has {len(by_label[label])} texts and none {what}; give more, or leave the label out")
    lost = Counter(left_out or {})
    lost[NOT_DRAWN] += len(found) - len(drawn)
    return Texts(tuple(sorted(by_label)), tuple(drawn), fold_of, {k: n for k, n in lost.items() if n}, dict(hashes or {}))


def _fold(group: str, test_share: float, folds: int, seed: int) -> int:
    place = stable_share(f"probe fold/{group}", seed)
    return TEST if place < test_share else min(int((place - test_share) / (1 - test_share) * folds), folds - 1)


def texts_of(path: Path | None, scenarios: Path | None, replies: Path | None, settings: ProbeSettings) -> Texts:
    """The texts of a run: those of a labelled file, else the replies of a bank.

    Raises:
        DataError: for whatever is wrong with them.
    """
    if path is None:
        found, hashes = own_texts(scenarios, replies)
        left_out: Mapping[str, int] = {}
    else:
        found, left_out = read_texts(path)
        hashes = {path.name: sha256_file(path)}
    return arranged(found, settings.per_label, settings.test_share, settings.folds, settings.seed, left_out, hashes)
