"""The chooser: its chances, its file, which model reads; and its training on a small model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from emosteer.base import artifacts
from emosteer.base.artifacts import Provenance
from emosteer.base.errors import ArtifactError
from emosteer.judges.choosing import chooser as chooser_module
from emosteer.judges.choosing import training
from emosteer.judges.choosing.chooser import ANSWER, ASSET, EMOTION, KIND, NO, SENSE, YES, Chooser, save_chooser
from emosteer.judges.choosing.reading import feature_count, read_replies
from emosteer.judges.embedded import LinearHead
from emosteer.judges.protocol import LABELS
from emosteer.models.model import Model
from emosteer.scenarios.scenarios import NEUTRAL
from tests.conftest import build

PAIRS = [("i waited nine weeks", "they never called ."), ("i waited nine weeks", "run home"), ("the train was late", "no"), ("x", " ")]


def heads(features: int, seed: int = 0) -> dict[str, LinearHead]:
    made = torch.Generator().manual_seed(seed)

    def head(labels: tuple[str, ...]) -> LinearHead:
        weight = torch.randn(len(labels), features, generator=made)
        return LinearHead(labels, torch.zeros(features), torch.ones(features), weight, torch.randn(len(labels), generator=made))

    return {SENSE: head((YES, NO)), ANSWER: head((YES, NO)), EMOTION: head(LABELS)}


def provenance(model: Model) -> Provenance:
    return Provenance(model.name, model.sha256, model.template_sha256, "by a test")


def test_a_chance_is_the_product_of_what_the_heads_say(tiny: Model) -> None:
    """Of several wanted emotions any will do; of unknown ones, or none, the mood does not count; an empty reply has no chance."""
    made = heads(feature_count(tiny))
    found = Chooser(tiny, made)
    features = read_replies(tiny, PAIRS[:3])
    sense, answer, voiced = (made[name].probabilities(features) for name in (SENSE, ANSWER, EMOTION))
    both = sense[:, 0] * answer[:, 0]
    anger, fear = LABELS.index("anger"), LABELS.index("fear")
    assert torch.allclose(found.chances(PAIRS, [("anger",)] * 4)[:3], both * voiced[:, anger], atol=1e-6)
    assert torch.allclose(found.chances(PAIRS, [("anger", "fear", "trust")] * 4)[:3], both * voiced[:, [anger, fear]].sum(-1), atol=1e-6)
    for nothing in ((), ("trust",)):
        assert torch.allclose(found.chances(PAIRS, [nothing] * 4)[:3], both, atol=1e-6)
    assert found.chances(PAIRS, [("anger",)] * 4)[3] == 0 and not len(found.chances([], []))
    assert found.chances(PAIRS[3:], [()]).tolist() == [0.0]


def test_a_pair_is_read_once(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidates often begin alike."""
    read: list[int] = []
    monkeypatch.setattr(chooser_module, "read_replies", lambda model, pairs: (read.append(len(pairs)), read_replies(model, pairs))[1])
    found = Chooser(tiny, heads(feature_count(tiny))).chances([*PAIRS, *PAIRS], [("anger",)] * 4 + [("fear",)] * 4)
    assert read == [3] and found[0] != found[4]


def test_its_file_round_trips_and_the_writer_reads_where_it_is_the_reader(tiny: Model, tmp_path: Path) -> None:
    """Nothing else is loaded then."""
    path, made = tmp_path / "chooser.safetensors", heads(feature_count(tiny))
    save_chooser(path, made, {"n": 1}, provenance(tiny))
    found = Chooser.load(tiny, path)
    assert found.model is tiny and found.key == Chooser(tiny, made).key
    assert torch.equal(found.chances(PAIRS, [("fear",)] * 4), Chooser(tiny, made).chances(PAIRS, [("fear",)] * 4))
    assert Chooser(tiny, heads(feature_count(tiny), 1)).key != found.key


def test_another_model_writes_and_the_packaged_one_reads(tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And it is refused if it is not the one that the heads were fitted on."""
    path = tmp_path / "chooser.safetensors"
    save_chooser(path, heads(feature_count(tiny)), {}, provenance(tiny))
    other, asked = build("qwen2", 3), []
    monkeypatch.setattr(Model, "load", lambda name, device: (asked.append((name, device)), tiny)[1])
    chooser_module._packaged.cache_clear()
    assert Chooser.load(other, path).model is Chooser.load(other, path).model is tiny
    assert asked == [(chooser_module.READER, "cpu")], "once"
    chooser_module._packaged.cache_clear()
    monkeypatch.setattr(Model, "load", lambda name, device: other)
    with pytest.raises(ArtifactError, match="this chooser"):
        Chooser.load(None, path)
    chooser_module._packaged.cache_clear()


def test_a_broken_file_is_refused_in_one_line(tiny: Model, tmp_path: Path) -> None:
    """Heads that are missing, of other labels, or of other features."""
    path, size = tmp_path / "chooser.safetensors", feature_count(tiny)
    made = heads(size)
    save_chooser(path, {name: made[name] for name in (SENSE, ANSWER)}, {}, provenance(tiny))
    with pytest.raises(ArtifactError, match="no head 'emotion'"):
        Chooser.load(tiny, path)
    save_chooser(path, made | {SENSE: replace(made[SENSE], labels=("good", "bad"))}, {}, provenance(tiny))
    with pytest.raises(ArtifactError, match="expected the labels of 'sense'"):
        Chooser.load(tiny, path)
    save_chooser(path, made | heads(size - 1), {}, provenance(tiny))
    with pytest.raises(ArtifactError, match=f"reads {size - 1} features"):
        Chooser.load(tiny, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ArtifactError):
        Chooser.load(tiny, path)
    with pytest.raises(ArtifactError, match="does not exist"):
        Chooser.load(tiny, tmp_path / "none")


# ---- fitting -----------------------------------------------------------------------------------------------------------


def write_data(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replies that make sense end in "home", those that answer begin with "they"; angry ones hold "slam"."""
    (root / "judge").mkdir(parents=True)
    places = ("office", "train", "flat", "desk", "door", "permit", "landlord", "boss", "call", "weeks")
    for seed, file in enumerate((*training.STRICT, *training.FURTHER, training.HELD)):
        lines = []
        for n, place in enumerate(places):
            for m in range(8):
                answers, sound, angry = m % 2 == 0, m // 2 % 2 == 0, m // 4 == 0
                text = (
                    f"{'they' if answers else 'never'} {'slam slam' if angry else 'dance dance'} the {place} {'home' if sound else 'cry'}"
                )
                said = f"i waited at the {place} {('now', 'ever', 'again', 'please', 'stop', 'back', 'late')[seed]} {n}"
                lines.append(
                    {
                        "prompt": said,
                        "text": text,
                        "answers": answers,
                        "sound": sound,
                        "label": "anger" if angry else NEUTRAL,
                        "method": "x",
                    }
                )
        lines.append({**lines[0], "text": " "})
        (root / file).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    monkeypatch.setattr(training, "data_path", lambda file: root / file)


def test_training_learns_what_readers_told_and_measures_it_on_prompts_left_out(
    tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a random model, whose states tell words apart; the file is the chooser that was measured."""
    write_data(tmp_path, monkeypatch)
    monkeypatch.setattr(Model, "load", lambda name, dtype="auto": tiny)
    out = tmp_path / "chooser.safetensors"
    card = training.train(out)
    held = card[training.HELD]
    assert held["n"] == 80 and held["sense"] > 0.95 and held["answers"] > 0.9 and held["emotion"] > 0.95 and held["both"] > 0.9
    assert held["readers"] == {"sense": 0.5, "answers": 0.5, "both": 0.25}
    again = tmp_path / "again.safetensors"
    training.train(again)
    assert again.read_bytes() == out.read_bytes()
    found = Chooser.load(tiny, out)
    replies = [
        "they slam slam the boss home",
        "never slam slam the boss home",
        "they dance dance the boss home",
        "they slam slam the boss cry",
    ]
    chances = found.chances([("i waited at the boss", reply) for reply in replies], [("anger",)] * 4)
    assert chances.argmax() == 0


def test_how_much_sense_is_enough_is_learned_from_strict_readers_alone(
    tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others call everything sound, and nothing changes."""
    write_data(tmp_path, monkeypatch)
    monkeypatch.setattr(Model, "load", lambda name, dtype="auto": tiny)
    training.train(tmp_path / "one.safetensors")
    for file in training.FURTHER:
        lines = [json.loads(line) for line in (tmp_path / file).read_text(encoding="utf-8").splitlines()]
        (tmp_path / file).write_text("".join(json.dumps({**line, "sound": True}) + "\n" for line in lines), encoding="utf-8")
    training.train(tmp_path / "two.safetensors")
    one, two = (Chooser.load(tiny, tmp_path / f"{name}.safetensors").heads for name in ("one", "two"))
    assert {name: head.key for name, head in one.items()} == {name: head.key for name, head in two.items()}


def test_the_area_under_the_curve_by_hand() -> None:
    """Three pairs of four in order, one tie."""
    assert training.area(torch.tensor([0.9, 0.2, 0.2, 0.1]), torch.tensor([True, True, False, False])) == pytest.approx(3.5 / 4)
    assert training.area(torch.tensor([0.9]), torch.tensor([True])) is None


# ---- the shipped one -----------------------------------------------------------------------------------------------------


def test_the_shipped_chooser_was_fitted_on_these_files_and_does_what_its_card_says() -> None:
    """Its data are those here; held-out areas are above chance by far; no development prompt was fitted on."""
    found = artifacts.load(ASSET, KIND)
    from emosteer.base.files import sha256_file
    from emosteer.scenarios.scenarios import data_path

    files = (*training.STRICT, *training.FURTHER, training.HELD)
    assert found.provenance.data == {file: sha256_file(data_path(file)) for file in files}
    card = found.fields["card"]
    assert card[training.HELD]["n"] == sum(1 for _ in data_path(training.HELD).open(encoding="utf-8"))
    for file, least in (("judge/sampled_read.jsonl", 0.75), ("judge/greedy_read.jsonl", 0.75), (training.HELD, 0.68)):
        assert card[file]["sense"] > least and card[file]["answers"] > 0.65 and card[file]["emotion"] > 0.7
