"""Where judge texts come from: the project's own (data/judge/) and public ones that people labelled, from a folder or their public homes.

The public texts are never committed. A folder holds JSON lines `{"text", "labels"}` in files named after their source: `NAME.jsonl`, of
which a seventh is held out by hash, or `NAME-train.jsonl`, `NAME-dev.jsonl` and `NAME-test.jsonl`. Labels are the emotions and neutral;
texts with several labels, or with one that no judge tells, are left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emosteer.base.errors import DataError, EmosteerError, first_line
from emosteer.base.files import read_jsonl, sha256_file, write_jsonl
from emosteer.base.progress import note
from emosteer.judges.protocol import LABELS
from emosteer.scenarios.scenarios import NEUTRAL
from emosteer.scenarios.splits import stable_share

#: Share of the texts of a source without a split of its own that no judge is fitted on.
HELD_OUT = 1 / 7
#: What GoEmotions masks is read as an everyday word, since no reply holds a mask.
MASKS = {"[NAME]": "Alex", "[RELIGION]": "Christian"}
SPLITS = ("train", "dev", "test")

Labelled = tuple[str, str]


@dataclass(frozen=True)
class Source:
    """One source's texts with their labels. public: whether it comes from outside the project; files: name -> sha256."""

    name: str
    train: tuple[Labelled, ...]
    test: tuple[Labelled, ...]
    public: bool
    files: Mapping[str, str]


def read_public(folder: Path) -> list[Source]:
    """The sources of a folder, by name.

    Raises:
        DataError: if there is none, a line is not what it should be, or a source has no text to fit on or none to measure on.
    """
    files = sorted(folder.glob("*.jsonl")) if folder.is_dir() else []
    if not files:
        raise DataError(
            f"expected public labelled texts (NAME.jsonl, lines of 'text' and 'labels') in {folder}, found none; "
            "`python -m emosteer.judges.sources FOLDER` fetches them, docs/JUDGES.md says what they are"
        )
    by_name: dict[str, dict[str, list[Labelled]]] = {}
    hashes: dict[str, dict[str, str]] = {}
    for file in files:
        stem, _, split = file.stem.rpartition("-")
        name, split = (stem, split) if stem and split in SPLITS else (file.stem, "")
        parts = by_name.setdefault(name, {"train": [], "test": []})
        hashes.setdefault(name, {})[file.name] = sha256_file(file)
        for labelled in read_labelled(file):
            if split != "dev":
                parts["test" if split == "test" or (not split and held_out(labelled[0])) else "train"].append(labelled)
    for name, parts in by_name.items():
        if not parts["train"] or not parts["test"]:
            found = f"{len(parts['train'])} and {len(parts['test'])}"
            raise DataError(
                f"expected texts of '{name}' in {folder} to fit on and others to measure on, found {found}; add the missing file"
            )
    return [Source(name, tuple(parts["train"]), tuple(parts["test"]), True, hashes[name]) for name, parts in by_name.items()]


def held_out(text: str) -> bool:
    """Whether a text serves for measuring only; decided by the text alone, so that adding texts moves none."""
    return stable_share(f"judge/{text}", 0) < HELD_OUT


def read_labelled(file: Path) -> list[Labelled]:
    """(text, label) of the lines that have one label which judges tell.

    Raises:
        DataError: naming file and line.
    """
    read: list[Labelled] = []
    for number, row in read_jsonl(file, "labelled texts"):
        text, labels = row.get("text"), row.get("labels")
        if not isinstance(text, str) or not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
            raise DataError(f"{file}:{number}: expected 'text' to be a text and 'labels' a list of names")
        if len(labels) == 1 and labels[0] in LABELS and text.strip():
            for mask, word in MASKS.items():
                text = text.replace(mask, word)
            read.append((text, labels[0]))
    return read


# ---- fetching ----------------------------------------------------------------------------------------------------------------------

_GOEMOTIONS = "https://raw.githubusercontent.com/google-research/google-research/master/goemotions/data/"
_XED = "https://raw.githubusercontent.com/Helsinki-NLP/XED/master/AnnotatedData/"
_EKMAN = {"joy": "happiness"}
#: XED's labels by their number; the file of neutral lines has a number of its own for them.
_PLUTCHIK = dict(enumerate((NEUTRAL, "anger", "anticipation", "disgust", "fear", "happiness", "sadness", "surprise", "trust")))
_XED_NEUTRAL = {9: NEUTRAL}
#: How many texts each file has, as published: a file with another number is not the one that was described.
TEXTS = {"goemotions-ekman-train": 43_410, "goemotions-ekman-dev": 5_426, "goemotions-ekman-test": 5_427}

Fetch = Callable[[str], str]


def goemotions(split: str, fetch: Fetch) -> list[dict[str, Any]]:
    """A split of GoEmotions (Demszky et al. 2020, Apache-2.0): the authors' 27 labels in Ekman's grouping, by their own mapping.

    Raises:
        DataError: if a line has a label that there is not.
    """
    names = dict(enumerate(fetch(f"{_GOEMOTIONS}emotions.txt").split()))
    mapping: dict[str, list[str]] = json.loads(fetch(f"{_GOEMOTIONS}ekman_mapping.json"))
    ekman = {fine: _EKMAN.get(coarse, coarse) for coarse, members in mapping.items() for fine in members} | {NEUTRAL: NEUTRAL}
    coarse = {number: ekman[name] for number, name in names.items() if name in ekman}
    file = f"{_GOEMOTIONS}{split}.tsv"
    rows = [line.split("\t") for line in fetch(file).replace("\r\n", "\n").split("\n") if "\t" in line]
    return [{"text": row[0], "labels": sorted(set(_labels(row[1], coarse, file)))} for row in rows]


def xed(fetch: Fetch) -> list[dict[str, Any]]:
    """The English part of XED (Ohman et al. 2020, CC BY 4.0): film subtitle lines with Plutchik's labels, and neutral ones.

    Raises:
        DataError: if a line has a label that there is not.
    """
    emotional, neutral = f"{_XED}en-annotated.tsv", f"{_XED}neu_en.txt"
    lines = [line.rpartition("\t") for line in fetch(emotional).replace("\r\n", "\n").split("\n") if "\t" in line]
    rows = [{"text": text, "labels": _labels(labels, _PLUTCHIK, emotional)} for text, _, labels in lines]
    # here the number stands in front, and some lines hold nothing but tabs
    for line in fetch(neutral).replace("\r\n", "\n").split("\n"):
        number, _, text = line.partition("\t")
        if text.strip():
            rows.append({"text": text, "labels": _labels(number, _XED_NEUTRAL, neutral)})
    return rows


def _labels(numbers: str, names: Mapping[int, str], file: str) -> list[str]:
    try:
        return [names[int(number)] for number in numbers.split(",")]
    except (KeyError, ValueError) as error:
        raise DataError(f"expected labels with the numbers {', '.join(map(str, names))} in {file}, found '{numbers}'") from error


def fetch_public(folder: Path, fetch: Fetch) -> None:
    """Writes both to a folder, as `read_public` takes them.

    Raises:
        DataError: if what came is not what was published. EmosteerError: if it cannot be fetched.
    """
    made = {f"goemotions-ekman-{split}": goemotions(split, fetch) for split in SPLITS} | {"xed-en": xed(fetch)}
    for name, rows in made.items():
        if name in TEXTS and len(rows) != TEXTS[name]:
            raise DataError(f"expected {TEXTS[name]:,} texts of {name}, found {len(rows):,}: the published file has changed")
    for name, rows in made.items():
        write_jsonl(folder / f"{name}.jsonl", rows)
        note(f"{folder / name}.jsonl: {len(rows):,} texts")


def over_http(address: str) -> str:
    """A public file as text.

    Raises:
        EmosteerError: if it cannot be fetched.
    """
    import httpx

    try:
        return httpx.get(address, timeout=60, follow_redirects=True).raise_for_status().text
    except httpx.HTTPError as error:
        raise EmosteerError(
            f"{address} cannot be fetched ({first_line(error)}); put the files into the folder by hand (docs/JUDGES.md)"
        ) from error


def main(arguments: Sequence[str]) -> None:
    """`python -m emosteer.judges.sources FOLDER` fetches the public texts."""
    if len(arguments) != 1:
        raise DataError("expected one folder to write the public texts to")
    fetch_public(Path(arguments[0]), over_http)


if __name__ == "__main__":
    import sys

    try:
        main(sys.argv[1:])
    except EmosteerError as error:
        sys.exit(f"emosteer: {error}")
