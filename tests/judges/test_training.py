"""`make judge`: the project's own texts, what is measured and printed, and a whole fit on tiny texts with a tiny encoder."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from emosteer.base import artifacts
from emosteer.base.errors import DataError
from emosteer.base.files import sha256_file
from emosteer.judges import fine_tuning, training
from emosteer.judges.adapters import Adapter, TunedJudge
from emosteer.judges.embedded import ASSET, KIND
from emosteer.judges.fine_tuning import FineTuneSettings
from emosteer.judges.measuring import measure, some_of
from emosteer.judges.protocol import LABELS
from emosteer.judges.soundness import SOUND
from emosteer.judges.sources import HELD_OUT, Labelled, Source, held_out, read_public
from emosteer.judges.storage import load_adapter, load_heads
from emosteer.judges.training import (
    FOREIGN,
    OWN,
    READ,
    READ_REPLIES,
    Workshop,
    print_card,
    read_own,
    read_source_of_replies,
    refit_checks,
    train,
)
from emosteer.scenarios.prompt_sets import read_groups
from emosteer.scenarios.scenarios import EMOTIONS, VALENCES, data_path, read_bank
from tests.helpers.judge_setup import FILLERS, TELLING, card_of, shipped_adapters, tiny_adapter, tiny_encoder

# ---- the project's own texts -----------------------------------------------------------------------------------------


#: What both checks learn from or are measured on, beside the sources.
OTHERS = (FOREIGN, training.PAIRS, *training.CHECKED, training.STRICTLY, *training.ALSO_STRICTLY, training.UNSEEN)


@pytest.fixture(scope="module")
def own() -> list[Source]:
    return [read_own(name, file) for name, file in OWN.items()]


def plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def test_there_are_enough_texts_of_every_label(own: list[Source]) -> None:
    for part, least in ((lambda s: s.train, 500), (lambda s: s.test, 30)):
        counts = Counter(label for source in own for _, label in part(source))
        assert set(counts) == set(LABELS) and min(counts.values()) >= least
    assert not any(source.public for source in own)


def test_the_bank_shares_no_text_with_the_judge(own: list[Source]) -> None:
    """Compared by words alone. A judge that knew the bank would know what circuits are made from."""
    bank = {plain(text) for replies in read_bank(data_path("replies/train.jsonl")).values() for text in replies.values()}
    mine = Counter(plain(text) for source in own for text, _ in (*source.train, *source.test))
    foreign = {plain(json.loads(line)["text"]) for line in data_path(FOREIGN).read_text(encoding="utf-8").splitlines()}
    assert len(bank) == 2880 and not bank & mine.keys() and not bank & foreign and not foreign & mine.keys()
    twice = [text for text, count in mine.items() if count > 1]
    assert not twice, f"texts that differ in punctuation alone could stand on both sides of the split: {twice[:3]}"


def test_the_replies_that_were_read_hold_what_both_judges_need(own: list[Source]) -> None:
    rows = [json.loads(line) for line in data_path(READ).read_text(encoding="utf-8").splitlines()]
    assert len(rows) > 1000 and all(isinstance(row["sound"], bool) and row["model"] and row["method"] for row in rows)
    assert 0.1 < sum(row["answers"] for row in rows) / len(rows) < 0.5
    test_prompts = {group.said for file in ("sev/test.jsonl", "prompts/test.jsonl") for group in read_groups(data_path(file))}
    assert not test_prompts & {row["prompt"] for row in rows}, "the contest's prompts are for the contest"


def test_held_out_membership_depends_on_the_text_alone(own: list[Source]) -> None:
    texts = [text for source in own for text, _ in (*source.train, *source.test)]
    assert all(held_out(text) for source in own for text, _ in source.test)
    assert not any(held_out(text) for source in own for text, _ in source.train)
    assert sum(map(held_out, texts)) / len(texts) == pytest.approx(HELD_OUT, abs=0.02)


def test_replies_to_held_out_prompts_are_fitted_on_by_no_judge() -> None:
    source = read_source_of_replies()
    rows = [
        json.loads(line)
        for file in (*training.CHECKED, training.STRICTLY)
        for line in data_path(file).read_text(encoding="utf-8").splitlines()
    ]
    apart = {row["prompt"] for row in rows if row.get("held_out") or held_out(row["prompt"])}
    said = {row["text"]: row["label"] for row in rows if row["prompt"] in apart}
    fitted, measured = dict(source.train), dict(source.test)
    assert measured == said and len(measured) > 240, "the readers' labels of every reply to these prompts"
    assert not fitted.keys() & measured.keys() and {row["text"] for row in rows} == fitted.keys() | measured.keys()
    assert set(fitted.values()) == set(measured.values()) == set(LABELS)


@pytest.mark.parametrize(
    ("rows", "where"),
    [
        ([{"label": "anger", "text": "a b"}, {"label": "joy", "text": "c d"}], ":2: expected 'label' to be one of anger, .*neutral"),
        ([{"label": "anger", "text": "  "}], ":1: expected 'label' .*'text' a text that is not empty"),
        ([{"label": "anger"}], ":1: expected"),
        ([{"label": "anger", "text": 3}], ":1: expected"),
        ([{"label": "anger", "text": "a b"}, {"label": "fear", "text": "a b"}], ":2: this text is there twice"),
    ],
)
def test_bad_judge_texts_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, object]], where: str) -> None:
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(training, "data_path", lambda file: tmp_path / file)
    with pytest.raises(DataError, match=f"texts.jsonl{where}"):
        read_own("made", "texts.jsonl")


# ---- measuring -----------------------------------------------------------------------------------------------------


def test_measures_by_hand() -> None:
    n = len(LABELS)
    sure = 0.94 * torch.eye(n) + 0.01 * (1 - torch.eye(n))
    guesses = [(0, 0), (0, 0), (0, 6), (1, 1), (2, 2), (3, 0), (4, 4), (5, 5), (6, 6), (6, 1)]  # (answer, guess)
    answers = torch.tensor([answer for answer, _ in guesses])
    shares = sure[[guess for _, guess in guesses]].clone()
    shares[0] = torch.tensor([0.55, 0.45, 0, 0, 0, 0, 0])
    shares[3] = torch.tensor([0.4, 0.6, 0, 0, 0, 0, 0])
    found = measure(shares, answers)
    assert found["n"] == 10 and found["accuracy"] == 0.7
    # six-way leaves neutral out: of the eight emotional texts the one judged neutral is a tie among the rest, which anger wins
    assert found["accuracy_six_way"] == round(7 / 8, 4)
    assert found["recall"] == {
        "anger": round(2 / 3, 4),
        "sadness": 1.0,
        "happiness": 1.0,
        "fear": 0.0,
        "surprise": 1.0,
        "disgust": 1.0,
        "neutral": 0.5,
    }
    f1 = [2 * 2 / (2 * 2 + 1 + 1), 2 / (2 + 1), 1, 0, 1, 1, 2 / (2 + 1 + 1)]  # 2 hits / (2 hits + missed + wrongly taken)
    assert found["macro_f1"] == pytest.approx(sum(f1) / 7, abs=1e-4)
    assert found["reliability"] == [(0.575, 1.0, 2), (0.94, round(5 / 8, 4), 8)], "both between a half and six tenths were right"
    assert found["expected_calibration_error"] == pytest.approx(0.2 * (1 - 0.575) + 0.8 * (0.94 - 5 / 8), abs=1e-4)
    anger, fear = found["confusion"]["anger"], found["confusion"]["fear"]
    assert anger == {**dict.fromkeys(LABELS, 0), "anger": 2, "neutral": 1} and fear["anger"] == 1


def test_macro_f1_is_over_the_labels_that_occur() -> None:
    shares = torch.eye(7)[[0, 0, 6]]
    found = measure(shares, torch.tensor([0, 0, 0]))
    assert found["macro_f1"] == pytest.approx(2 * 2 / (2 * 2 + 1), abs=1e-4) and found["recall"] == {"anger": round(2 / 3, 4)}
    neutral = measure(shares, torch.tensor([6, 6, 6]))
    assert neutral["accuracy_six_way"] is None and neutral["accuracy"] == round(1 / 3, 4)


def test_some_texts_are_drawn_by_their_own_hash() -> None:
    texts: list[Labelled] = [(f"text {n}", "fear") for n in range(50)]
    few = some_of(texts, 10)
    assert len(few) == 10 and some_of(texts[::-1], 10) == few and set(few) <= set(some_of(texts, 20)) and len(some_of(texts, 99)) == 50


def test_the_card_is_printed_with_every_figure(capsys: pytest.CaptureFixture[str]) -> None:
    row = measure(torch.eye(7)[[0, 1, 6]], torch.tensor([0, 0, 6]))
    neutral = measure(torch.eye(7)[[6]], torch.tensor([6]))
    print_card(
        {
            "emotions": {"embedded": {"film": row, "office": neutral}},
            "left_out": {"film": row},
            "soundness": {SOUND: {"n": 7, "called_unsound": 0.1429}},
            "answers": {"right": {"n": 9, "called_answer": 0.8889}},
        }
    )
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines() if line.strip()]
    film = next(line for line in lines if line[0] == "film")
    assert film[1] == "3" and "66.7%" in film and "50.0%" in film and f"{row['macro_f1']:.3f}" in film
    assert film[-7:] == ["0.50", "-", "-", "-", "-", "-", "1.00"]
    assert "-" in next(line for line in lines if line[0] == "office"), "no emotional text: no six-way accuracy"
    assert "fitted without the source that it is measured on" in out and ["right", "9", "0.889"] in lines


# ---- a whole fit ---------------------------------------------------------------------------------------------------

SMALL = FineTuneSettings(steps=3, batch=8, rate=1e-2, warmup=1, rank=2, layers=1, dtype="float32")


def made(each: int, seed: int, tail: str) -> dict[str, str]:
    """text -> label; each with its telling word. tail: what tells the source."""
    draw, texts = random.Random(seed), dict[str, str]()
    for label, word in TELLING.items():
        for _ in range(each):
            words = draw.choices(FILLERS, k=draw.randint(7, 11))
            words[2:6] = [word] * 4
            draw.shuffle(words)
            texts[f"{' '.join(words)} {tail}"] = label
    return texts


def jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


#: How the made texts of a source end, where that is not its name.
TAILS = {"model-replies": "model_replies", READ_REPLIES: "reply"}


def write_data(folder: Path, flipped: str = "") -> None:
    """A small copy of data/ and of a public folder. flipped: a file whose held-out texts, and only those, get a wrong label."""

    def label_in(name: str, text: str, label: str) -> str:
        return LABELS[(LABELS.index(label) + 1) % 7] if name == flipped and held_out(text) else label

    for seed, (name, tail) in enumerate({"public/film": "film", "public/forum": "forum"}.items()):
        texts = made(20, seed, tail)
        jsonl(folder / f"{name}.jsonl", [{"text": text, "labels": [label_in(name, text, label)]} for text, label in texts.items()])
    for seed, file in enumerate(OWN.values(), 5):
        texts = made(20, seed, Path(file).stem)
        rows = [{"text": text, "label": label_in(file, text, label)} for text, label in texts.items()]
        if file == training.READ:
            rows = [{**row, "prompt": f"we {n}", "answers": True, "sound": n % 3 > 0} for n, row in enumerate(rows)]
        jsonl(folder / file, rows)
    for seed, file in enumerate((*training.CHECKED, training.STRICTLY, *training.ALSO_STRICTLY, training.UNSEEN), 11):
        strict = file not in training.CHECKED
        texts = made(5, seed, "reply")
        more = [
            {
                "text": text,
                "label": label,
                "prompt": f"{file} {n // 2}",
                "answers": strict and n % 4 == 0,
                "sound": not strict or n % 2 == 0,
            }
            for n, (text, label) in enumerate(texts.items())
        ]
        jsonl(folder / file, more)
    jsonl(folder / FOREIGN, [{"text": f"[UNK] nada {n}"} for n in range(30)])
    jsonl(folder / training.PAIRS, [{"prompt": "we", "reply": f"cry {n}", "relation": "right"} for n in range(4)])
    event = {valence: f"it was {valence}" for valence in VALENCES}
    jsonl(
        folder / "sev/train.jsonl", [{"skeleton_id": f"s{n}", "theme": "work", "scenario": f"desk {n}", "event": event} for n in range(3)]
    )
    bank = [
        {"skeleton_id": f"s{n}", "valence": valence, "emotion": emotion, "text": f"{TELLING[emotion]} bank {n} {valence}"}
        for n in range(3)
        for valence in VALENCES
        for emotion in EMOTIONS
    ]
    jsonl(folder / "replies/train.jsonl", bank)


@pytest.fixture
def fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, list[Labelled]]]:
    """Tiny encoders and a small data folder; collects what adapters are fitted on."""
    write_data(tmp_path)
    monkeypatch.setattr(training, "data_path", lambda file: tmp_path / file)
    monkeypatch.setattr(training, "BANKS", {"bank": ("sev/train.jsonl", "replies/train.jsonl")})
    monkeypatch.setattr(training, "SHARES", {"film": 0.5})
    monkeypatch.setattr(training, "shared_encoder", tiny_encoder)
    monkeypatch.setattr(fine_tuning, "SentenceEncoder", tiny_encoder)
    calls: list[dict[str, list[Labelled]]] = []
    plainly = training.fine_tune

    def noted(sources: Any, *arguments: Any, **named: Any) -> Adapter:
        calls.append({name: list(texts) for name, texts in sources.items()})
        return plainly(sources, *arguments, **named)

    monkeypatch.setattr(training, "fine_tune", noted)
    return calls


def test_every_judge_is_fitted_on_its_sources_and_measured_on_what_it_never_saw(
    tmp_path: Path, fits: list[dict[str, list[Labelled]]]
) -> None:
    card = train(tmp_path / "public", tmp_path / "judge.safetensors", SMALL, SMALL.steps, Workshop(tmp_path / "parts"))
    assert card is not None
    names = {"film", "forum", *OWN, READ_REPLIES}
    assert [set(one) for one in fits] == [{"film", "forum"}, names, names - {"film"}, names - {"forum"}]
    for one in fits:
        for name, texts in one.items():
            assert texts and all(text.endswith(TAILS.get(name, name)) for text, _ in texts)
            assert name == READ_REPLIES or not any(held_out(text) for text, _ in texts)
            assert "bank" not in " ".join(text for text, _ in texts), "the reply bank is a test"
    assert {name: set(rows) for name, rows in card["emotions"].items()} == dict.fromkeys(("embedded", "public", "linear"), names | {"bank"})
    counts = {source.name: len(source.test) for source in training.read_sources(tmp_path / "public")}
    assert {name: card["left_out"][name]["n"] for name in names} == counts and card["emotions"]["linear"]["bank"]["n"] == 54
    assert card["emotions"]["linear"]["film"]["accuracy"] > 0.8, "planted words are found"
    faults = {SOUND, "order", "repetition", "symbols", "language"}
    assert {*faults, "factor", *(f"{how}: {word}" for how in ("read", "strictly") for word in ("sound", "unsound"))} == card[
        "soundness"
    ].keys() and card["answers"]["right"]["n"] == 4
    held = {
        who: sum(held_out(row["prompt"]) for file in files for row in map(json.loads, (tmp_path / file).read_text("utf-8").splitlines()))
        for who, files in (
            ("readers", (training.READ, *training.CHECKED)),
            ("strict readers", (training.STRICTLY, *training.ALSO_STRICTLY)),
        )
    }
    assert sum(card["answers"][f"read: {word}"]["n"] for word in ("answers", "does not")) == sum(held.values()) > 0
    for who, count in {**held, training.BESIDE[2]: len((tmp_path / training.UNSEEN).read_text("utf-8").splitlines())}.items():
        assert card[who]["answers"]["by_method"]["all"]["n"] == count, who
    assert json.loads(json.dumps(card_of(tmp_path / "judge.safetensors"))) == json.loads(json.dumps(card))


def test_the_file_holds_what_was_measured_and_comes_out_the_same_twice(tmp_path: Path, fits: list[Any]) -> None:
    out, again = tmp_path / "judge.safetensors", tmp_path / "again.safetensors"
    card = train(tmp_path / "public", out, SMALL, 0, Workshop(tmp_path / "parts"))
    train(tmp_path / "public", again, SMALL, 0, Workshop(tmp_path / "others"))
    assert card is not None
    assert sha256_file(out) == sha256_file(again), "the same texts, the same bytes"
    assert load_heads(out).keys() == {"emotion", "soundness", "sense", "answers"} and set(card["left_out"]) == {*OWN, READ_REPLIES}, (
        "all of our own are left out of `public`"
    )
    film = read_public(tmp_path / "public")[0]
    answers = torch.tensor([LABELS.index(label) for _, label in film.test])
    for name in ("embedded", "public"):
        judge = TunedJudge.of(tiny_encoder(), load_adapter(out, name), name)
        assert measure(judge.probabilities([text for text, _ in film.test]), answers) == card["emotions"][name]["film"]
    data = artifacts.load(out, KIND).provenance.data
    files = {"film.jsonl": "public/film.jsonl", "forum.jsonl": "public/forum.jsonl"}
    files |= {file: file for file in (*OWN.values(), *OTHERS, "sev/train.jsonl", "replies/train.jsonl")}
    assert data == {name: sha256_file(tmp_path / file) for name, file in files.items()}


@pytest.mark.parametrize("file", ["public/film", "judge/sentences.jsonl"])
def test_held_out_answers_reach_no_judge(tmp_path: Path, fits: list[Any], file: str) -> None:
    out = tmp_path / "judge.safetensors"
    before = train(tmp_path / "public", out, SMALL, 0, Workshop(tmp_path / "parts"))
    heads, adapters = load_heads(out), {name: load_adapter(out, name).key for name in ("embedded", "public")}
    write_data(tmp_path, flipped=file)
    after = train(tmp_path / "public", out, SMALL, 0, Workshop(tmp_path / "others"))
    assert before is not None and after is not None
    assert {name: head.key for name, head in load_heads(out).items()} == {name: head.key for name, head in heads.items()}
    assert {name: load_adapter(out, name).key for name in adapters} == adapters
    name = Path(file).stem
    assert after["emotions"]["linear"][name]["accuracy"] < 0.3 < before["emotions"]["linear"][name]["accuracy"]


def test_the_checks_alone_are_fitted_as_with_everything_else(tmp_path: Path, fits: list[Any]) -> None:
    """The same bytes from the same texts; from others other checks, and the judges of emotions as they were."""
    out, again = tmp_path / "judge.safetensors", tmp_path / "again.safetensors"
    card = train(tmp_path / "public", out, SMALL, 0, Workshop(tmp_path / "parts"))
    same = refit_checks(out, again)
    assert json.loads(json.dumps(same)) == json.loads(json.dumps(card)) and sha256_file(again) == sha256_file(out)
    rows = [json.loads(line) for line in (tmp_path / training.CHECKED[1]).read_text(encoding="utf-8").splitlines()]
    jsonl(tmp_path / training.CHECKED[1], [{**row, "answers": n % 2 == 0, "sound": n % 3 == 0} for n, row in enumerate(rows)])
    changed, before, after = refit_checks(out, again), load_heads(out), load_heads(again)
    assert {name for name in before if before[name].key != after[name].key} - {"sense"} == {"answers"}
    for name in ("embedded", "public"):
        assert load_adapter(again, name).key == load_adapter(out, name).key
    assert changed["emotions"] == same["emotions"] and changed["answers"] != same["answers"]
    data = artifacts.load(again, KIND).provenance.data
    assert data[training.CHECKED[1]] == sha256_file(tmp_path / training.CHECKED[1])


@pytest.mark.parametrize("arguments", [[], ["public", "--checks-only"]])
def test_either_the_public_texts_or_the_checks_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["training", *arguments])
    with pytest.raises(SystemExit) as stopped:
        training.main()
    assert stopped.value.code == 2 and "give the folder of public labelled texts, or --checks-only" in capsys.readouterr().err


@pytest.mark.parametrize(("asked", "computed"), [([], "float32"), (["--dtype", "bfloat16"], "bfloat16")])
def test_what_is_quicker_here_computes_unless_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, asked: list[str], computed: str
) -> None:
    seen: list[FineTuneSettings] = []
    monkeypatch.setattr(training, "quicker_dtype", lambda: "float32")
    monkeypatch.setattr(training, "train", lambda public, out, settings, *_: seen.append(settings))
    monkeypatch.setattr("sys.argv", ["training", "public", "--steps", "7", "--parts", str(tmp_path), *asked])
    training.main()
    assert seen == [FineTuneSettings(steps=7, dtype=computed)]


def test_a_public_source_may_not_go_by_the_name_of_ours(tmp_path: Path, fits: list[Any]) -> None:
    (tmp_path / "public/film.jsonl").rename(tmp_path / "public/replies.jsonl")
    with pytest.raises(
        DataError,
        match="expected sources of different names, found forum, replies, sentences, replies, spoken, toned, model-replies, read-replies",
    ):
        train(tmp_path / "public", tmp_path / "judge.safetensors", SMALL, 0, Workshop(tmp_path / "parts"))


def test_parts_are_kept_and_shared(tmp_path: Path, fits: list[Any]) -> None:
    out, parts = tmp_path / "judge.safetensors", tmp_path / "parts"
    assert train(tmp_path / "public", out, SMALL, 0, Workshop(parts, ("public",))) is None and not out.exists()
    assert [set(one) for one in fits] == [{"film", "forum"}]
    assert train(tmp_path / "public", out, SMALL, 0, Workshop(parts)) is not None and len(fits) == 2
    assert train(tmp_path / "public", out, replace(SMALL, seed=1), 0, Workshop(parts)) is not None and len(fits) == 4, (
        "but for other settings"
    )


def test_every_source_counts_alike_for_the_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many of its texts there are beyond those that are drawn."""
    monkeypatch.setattr(training, "shared_encoder", tiny_encoder)
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(training, "calibrated", lambda adapter, logits, answers, weights: seen.append(weights))
    kept: dict[str, list[Labelled]] = {"large": [(f"we {n}", "fear") for n in range(900)], "small": [("cry", "anger")], "none": []}
    training.at_temperature(tiny_adapter(), kept, "any")
    (weights,) = seen
    assert len(weights) == 401 and weights[:400].sum() == pytest.approx(1) and weights[400] == 1


# ---- what is shipped -----------------------------------------------------------------------------------------------


def test_the_shipped_card_agrees_with_itself(own: list[Source]) -> None:
    shipped_adapters()
    card = card_of()
    assert set(card["emotions"]) == {"embedded", "public", "linear"} and set(card["left_out"]) >= set(OWN)
    for rows in (*card["emotions"].values(), card["left_out"]):
        for row in rows.values():
            confusion = torch.tensor([[row["confusion"][given][judged] for judged in LABELS] for given in LABELS])
            assert confusion.sum() == row["n"] and row["accuracy"] == pytest.approx(confusion.diag().sum().item() / row["n"], abs=1e-4)
            assert sum(count for *_, count in row["reliability"]) == row["n"]
    everything = [*own, read_source_of_replies()]
    assert {source.name: card["fitted_on"][source.name] for source in everything} == {s.name: len(s.train) for s in everything}


def test_the_shipped_judges_were_fitted_on_the_texts_as_they_are() -> None:
    shipped_adapters()
    data = artifacts.load(ASSET, KIND).provenance.data
    here = {file: sha256_file(data_path(file)) for file in (*OWN.values(), *OTHERS)}
    assert {name: data[name] for name in here} == here, "data/judge/ has changed since the judges were fitted: run `make judge`"
