"""Judge texts from outside: folders of JSON lines, their splits and masks, and the public files in their authors' own formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from emosteer.base.errors import DataError, EmosteerError
from emosteer.base.files import sha256_file
from emosteer.judges import sources
from emosteer.judges.sources import HELD_OUT, fetch_public, goemotions, held_out, main, over_http, read_labelled, read_public, xed


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def row(text: str, *labels: str) -> dict[str, Any]:
    return {"text": text, "labels": list(labels)}


# ---- folders -------------------------------------------------------------------------------------------------------


def test_texts_with_one_label_that_judges_tell_are_read(tmp_path: Path) -> None:
    file = write(
        tmp_path / "a.jsonl",
        row("one", "anger"),
        row("two", "anger", "fear"),
        row("none"),
        row("trust", "trust"),
        row("  ", "fear"),
        row("[NAME] told [NAME] of [RELIGION] [TEAM]", "neutral"),
    )
    assert read_labelled(file) == [("one", "anger"), ("Alex told Alex of Christian [TEAM]", "neutral")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a", "labels": ["fear"]}\n{"text": 3, "labels": ["fear"]}', ":2: expected 'text' to be a text and 'labels' a list"),
        ('{"text": "a", "labels": "fear"}', ":1: expected 'text'"),
        ('{"text": "a", "labels": [1]}', ":1: expected 'text'"),
        ('{"labels": ["fear"]}', ":1: expected 'text'"),
        ("[]", ":1: expected a JSON object"),
        ("", "is empty"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(DataError, match=f"a.jsonl ?{message}"):
        read_labelled(tmp_path / "a.jsonl")


def test_splits_by_name_and_by_hash(tmp_path: Path) -> None:
    write(tmp_path / "reddit-x-train.jsonl", row("t1", "fear"), row("t2", "anger"))
    write(tmp_path / "reddit-x-dev.jsonl", row("d1", "fear"))
    write(tmp_path / "reddit-x-test.jsonl", row("e1", "disgust"))
    write(tmp_path / "film-en.jsonl", *(row(f"line {n}", "sadness") for n in range(700)))
    (tmp_path / "notes.txt").write_text("not a source")
    film, reddit = read_public(tmp_path)
    assert (film.name, reddit.name) == ("film-en", "reddit-x") and film.public and reddit.public
    assert (reddit.train, reddit.test) == ((("t1", "fear"), ("t2", "anger")), (("e1", "disgust"),)), "dev serves for nothing"
    assert reddit.files == {f"reddit-x-{s}.jsonl": sha256_file(tmp_path / f"reddit-x-{s}.jsonl") for s in ("train", "dev", "test")}
    assert all(held_out(text) for text, _ in film.test) and not any(held_out(text) for text, _ in film.train)
    assert len(film.train) + len(film.test) == 700 and len(film.test) / 700 == pytest.approx(HELD_OUT, abs=0.05)


def test_a_folder_without_texts_says_where_they_are(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match=r"found none; `python -m emosteer.judges.sources FOLDER` fetches them, docs/JUDGES.md"):
            read_public(folder)


@pytest.mark.parametrize(("split", "counts"), [("train", "1 and 0"), ("test", "0 and 1")])
def test_a_source_needs_texts_to_fit_on_and_to_measure_on(tmp_path: Path, split: str, counts: str) -> None:
    write(tmp_path / f"half-{split}.jsonl", row("a", "fear"))
    with pytest.raises(DataError, match=f"texts of 'half' .*found {counts}"):
        read_public(tmp_path)


# ---- the authors' own formats --------------------------------------------------------------------------------------

MAPPING = {"anger": ["anger", "annoyance"], "joy": ["joy", "love", "optimism"], "sadness": ["grief"], "surprise": ["surprise"]}
NAMES = ("anger", "annoyance", "joy", "love", "optimism", "grief", "surprise", "neutral")


def published(**files: str) -> Any:
    """A fetch that knows some files by the end of their address and notes what it was asked."""

    def fetch(address: str) -> str:
        asked.append(address)
        return next(text for name, text in known.items() if address.endswith("/" + name))

    asked: list[str] = []
    known = {"emotions.txt": "\n".join(NAMES) + "\n", "ekman_mapping.json": json.dumps(MAPPING)}
    known |= {name.replace("__", "."): text for name, text in files.items()}
    fetch.asked = asked  # type: ignore[attr-defined]
    return fetch


def test_goemotions_in_its_authors_grouping() -> None:
    lines = ['He said "no"\t0\teew5j0j', "so good, [NAME]!\t2,3\ta", "mixed\t5,1\tb", "plain\t7\tc", "calm joy\t4,7\td"]
    fetch = published(**{"dev__tsv": "\r\n".join(lines) + "\r\n"})
    assert goemotions("dev", fetch) == [
        row('He said "no"', "anger"),
        row("so good, [NAME]!", "happiness"),  # two fine labels of one group are one label
        row("mixed", "anger", "sadness"),
        row("plain", "neutral"),
        row("calm joy", "happiness", "neutral"),
    ]
    assert all("google-research/goemotions/data/" in a or "/goemotions/data/" in a for a in fetch.asked)


@pytest.mark.parametrize("label", ["8", "-1", "x", ""])
def test_a_label_that_there_is_not_is_refused(label: str) -> None:
    with pytest.raises(DataError, match=f"expected labels with the numbers 0, 1, .*dev.tsv, found '{label}'"):
        goemotions("dev", published(**{"dev__tsv": f"text\t{label}\tid\n"}))
    if label != "8":
        with pytest.raises(DataError, match=f"en-annotated.tsv, found '{label}'"):
            xed(published(**{"en-annotated__tsv": f"text\t{label}\n", "neu_en__txt": ""}))


def test_xed_with_plutchik_s_labels_and_neutral_lines() -> None:
    """Labels count from 1, 0 is neutral; in the neutral file the number stands first, and some lines are nothing but tabs."""
    emotional = "!\t1, 4, 7\nI said\x85so , [PERSON]\t5\nA trap \t8, 1\nWell .\t0\nA dead man\t6\n"
    neutral = "9\tYeah I was just telling him.\n\t\t\t\t\n9\tLast card.\n\n"
    assert xed(published(**{"en-annotated__tsv": emotional, "neu_en__txt": neutral})) == [
        row("!", "anger", "fear", "surprise"),
        row("I said\x85so , [PERSON]", "happiness"),
        row("A trap ", "trust", "anger"),
        row("Well .", "neutral"),
        row("A dead man", "sadness"),
        row("Yeah I was just telling him.", "neutral"),
        row("Last card.", "neutral"),
    ]
    with pytest.raises(DataError, match="expected labels with the numbers 9 in .*neu_en.txt, found 'Last card.'"):
        xed(published(**{"en-annotated__tsv": "", "neu_en__txt": "Last card.\tx\n"}))


@pytest.fixture
def whole() -> Any:
    # every text once in each split, so that the sources have something to fit on and to measure on
    tsv = "angry\t0\ta\nglad\t2\tb\n"
    film = "".join(f"film {n}\t6\n" for n in range(40))
    return published(**{"train__tsv": tsv, "dev__tsv": tsv, "test__tsv": tsv, "en-annotated__tsv": film, "neu_en__txt": "9\tWell.\n"})


def test_what_was_fetched_is_what_is_read(tmp_path: Path, whole: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "TEXTS", {f"goemotions-ekman-{split}": 2 for split in ("train", "dev", "test")})
    monkeypatch.setattr(sources, "over_http", whole)
    main([str(tmp_path / "new")])
    reddit, film = read_public(tmp_path / "new")
    assert reddit.name == "goemotions-ekman" and reddit.train == reddit.test == (("angry", "anger"), ("glad", "happiness"))
    assert film.name == "xed-en" and len(film.train) + len(film.test) == 41
    with pytest.raises(DataError, match="expected one folder"):
        main([])


def test_files_of_another_length_are_refused_before_anything_is_written(tmp_path: Path, whole: Any) -> None:
    with pytest.raises(DataError, match="expected 43,410 texts of goemotions-ekman-train, found 2: the published file has changed"):
        fetch_public(tmp_path, whole)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_fetched_can_be_put_there_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(address: str, **_: object) -> httpx.Response:
        return httpx.Response(404, request=httpx.Request("GET", address))

    monkeypatch.setattr(httpx, "get", refuse)
    with pytest.raises(EmosteerError, match=r"http://127.0.0.1/x cannot be fetched \(.*404.*put the files into the folder by hand"):
        over_http("http://127.0.0.1/x")
