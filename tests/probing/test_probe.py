"""The whole run on a tiny random model, and each of its parts against something computed in another way."""

from __future__ import annotations

import contextlib
import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from emosteer.base import artifacts
from emosteer.base.errors import ArtifactError, DataError, ModelError
from emosteer.base.files import kept_progress, write_jsonl
from emosteer.cli import main as cli
from emosteer.models.model import Model
from emosteer.models.sites import MLP_OUT, RESID_POST, Site, Z, parse_site
from emosteer.probing import probe as stage
from emosteer.probing.malleability import CIRCUIT, RANDOM, SYSTEM, Steering, adding, as_long, readings
from emosteer.probing.persistence import WINDOW, held_out, neutral_tokens, persistence, rows_after
from emosteer.probing.probes import LINEAR, NONLINEAR, Probes
from emosteer.probing.prompting import FEW, ZERO, asked, conversation, examples
from emosteer.probing.reading import SHARD, frame, read_shards, text_row
from emosteer.probing.settings import HEADS, ProbeSettings
from tests.conftest import build, tiny_tokenizer
from tests.helpers.probe_setup import marked_texts, small_texts
from tests.helpers.tiny_project import write_tiny_project

SETTINGS = ProbeSettings(
    per_label=36,
    test_share=0.3,
    folds=2,
    decays=(0.01, 0.1),
    hidden=4,
    shuffles=4,
    epochs=20,
    longest=24,
    distances=(0, 12, 40, 1024),
    followed=60,
    prompted=12,
    moved=12,
)


def steering(model: Model) -> Steering:
    vectors = {Site(0, RESID_POST): torch.randn(2, model.shape.d_model, generator=torch.Generator().manual_seed(0))}
    return Steering(("anger", "fear"), vectors)


@pytest.fixture(scope="module")
def whole(tiny: Model, tmp_path_factory: pytest.TempPathFactory) -> tuple[Probes, Path]:
    """A run with all of its parts, and the folder of its progress."""
    folder = tmp_path_factory.mktemp("partial")
    return stage.probe(tiny, small_texts(), SETTINGS, folder, steering=steering(tiny)), folder


def test_what_the_words_carry_is_read_and_shuffled_labels_are_not(whole: tuple[Probes, Path]) -> None:
    found = whole[0]
    assert found.chosen == "resid_post" or found.chosen == "mlp_out"
    for kind in found.best:
        row = found.point(kind)
        least = 0.5 if kind == HEADS else 0.75  # a head of a random model need not look at the words that tell
        assert row["accuracy"]["value"] >= least and row["f1"] >= least - 0.05, kind
        assert row["shuffled"] < 0.55 and row["selectivity"] == pytest.approx(row["accuracy"]["value"] - row["shuffled"], abs=1e-5)
    assert found.lexical["value"] > 0.9 and int(found.confusion.sum()) == found.texts["test"]
    right = int(found.confusion.diagonal().sum()) / found.texts["test"]
    assert right == pytest.approx(found.point(found.chosen)["accuracy"]["value"], abs=1e-5)
    shuffled = [row["shuffled"] for row in found.points if row["form"] == LINEAR]
    assert abs(sum(shuffled) / len(shuffled) - 1 / 3) < 0.1
    assert {(row["kind"], row["form"]) for row in found.points} == {
        (kind, form) for kind in SETTINGS.kinds for form in (LINEAR, NONLINEAR) if (kind, form) != (HEADS, NONLINEAR)
    }


def test_the_best_probe_is_chosen_without_a_look_at_the_test_texts(tiny: Model, whole: tuple[Probes, Path], tmp_path: Path) -> None:
    """Test texts with other labels change what is measured, and neither the weights nor the choice."""
    texts = small_texts()
    others = {"anger": "fear", "fear": "sadness", "sadness": "anger"}
    wrong = [replace(text, label=others[text.label]) if i in texts.test else text for i, text in enumerate(texts.texts)]
    short = replace(SETTINGS, kinds=("resid_post",), hidden=0, followed=0, prompted=0, moved=0)
    changed = stage.probe(tiny, replace(texts, texts=tuple(wrong)), short, tmp_path)
    kept = whole[0]
    assert torch.equal(changed.weights["resid_post"], kept.weights["resid_post"]) and changed.best["resid_post"] == kept.best["resid_post"]
    assert changed.point("resid_post")["accuracy"]["value"] < 0.3 < 0.8 < kept.point("resid_post")["accuracy"]["value"]


@torch.no_grad()
def test_the_stored_weights_read_the_states_of_one_text_alone(tiny: Model, whole: tuple[Probes, Path]) -> None:
    found, folder = whole
    texts, before = small_texts(), frame(tiny)
    index = texts.test[3]
    ids = [*before, *tiny.text_ids(texts.texts[index].text)]
    sites = {"resid_post": Site(1, RESID_POST), "mlp_out": Site(2, MLP_OUT), "heads": Site(1, Z)}
    read = tiny.read(torch.tensor([ids]), list(sites.values()), bridge=False)
    for kind, site in sites.items():
        state = read[site][0, len(before) :].mean(0).unflatten(0, (found.weights[kind].shape[1], -1))
        logits = torch.einsum("ulw,uw->ul", found.weights[kind][site.layer], state) + found.biases[kind][site.layer]
        (file,) = folder.glob(f"*/{LINEAR}-{site}.safetensors")
        kept = artifacts.load(file, "piece").tensors["probabilities"][:, 0, 3]
        torch.testing.assert_close(logits.softmax(-1), kept, atol=1e-4, rtol=1e-3)


def test_what_is_pushed_along_a_probe_is_read_as_its_label(tiny: Model, whole: tuple[Probes, Path]) -> None:
    """The intervention that a probe's direction stands for; a push of equal length across it moves nothing."""
    found = whole[0]
    layer = found.best["resid_post"]["layer"]
    site, weights = Site(layer, RESID_POST), found.weights["resid_post"][layer, 0]
    (file,) = whole[1].glob(f"*/{LINEAR}-{site}.safetensors")
    reader = stage.Piece(**artifacts.load(file, "piece").tensors).fitted(0)
    texts = small_texts()
    rows = [text_row(tiny, frame(tiny), texts.texts[i].text, "mean", 24) for i in texts.test]
    before = readings(tiny, rows, site, reader, 200)
    for label in range(3):
        along = weights[label] - weights.mean(0)
        along = along / along.norm() * 12
        after = readings(tiny, rows, site, reader, 200, adding({site: along}))
        basis = torch.linalg.qr((weights - weights.mean(0)).T[:, :2])[0]
        random = torch.randn(len(along), generator=torch.Generator().manual_seed(label))
        random -= basis @ (basis.T @ random)
        across = readings(tiny, rows, site, reader, 200, adding({site: random / random.norm() * 12}))
        assert (after[:, 0, label] > before[:, 0, label]).all() and after[:, 0, label].mean() > 0.9
        torch.testing.assert_close(across[:, 0], before[:, 0], atol=1e-3, rtol=1e-2)


def test_malleability_tells_rises_by_label_and_leaves_the_label_s_own_texts_out(tiny: Model, whole: tuple[Probes, Path]) -> None:
    rows = whole[0].malleability["rows"]
    assert [(row["how"], row["dose"]) for row in rows if row["label"] == "anger"] == [
        (SYSTEM, None), (CIRCUIT, 0.5), (RANDOM, 0.5), (CIRCUIT, 1.0), (RANDOM, 1.0)
    ]  # fmt: skip
    assert [row["how"] for row in rows if row["label"] == "sadness"] == [SYSTEM], "the circuit knows no sadness"
    for row in rows:
        assert row["rise"]["value"] == pytest.approx(row["after"] - row["before"], abs=1e-5)
    lengths = as_long({Site(0, RESID_POST): torch.tensor([3.0, 4.0])}, 0)
    assert lengths[Site(0, RESID_POST)].norm() == pytest.approx(5.0)


@pytest.mark.parametrize("family_name", ["llama", "gemma3"])
def test_the_frame_is_what_the_template_puts_before_the_text(family_name: str) -> None:
    model = build(family_name)
    for system in (None, "keep reply alone"):
        turns = [{"role": "system", "content": system}] if system else []
        full = model.prompt_ids([*turns, {"role": "user", "content": "we cry alone"}])
        begun = [*frame(model, system), *model.text_ids("we cry alone")]
        assert full[: len(begun)] == begun and len(full) > len(begun)
    row = text_row(model, [1, 3], "we cry alone home", "mean", 3)
    assert row.reads == ((2, 3, 4),) and text_row(model, [1, 3], "we cry", "last", 9).reads == ((3,),)
    with pytest.raises(DataError, match="has no token"):
        text_row(model, [1], " ", "mean", 3)
    with pytest.raises(DataError, match="do not fit the context"):
        text_row(model, [1], "cry " * 300, "mean", 1000)


def test_what_is_read_after_neutral_tokens_is_neutral_and_the_same_for_all_labels(tiny: Model) -> None:
    texts = [text.text for text in marked_texts(8)]
    rows = rows_after(tiny, texts, 24, (0, 12, 40), 0)
    fillers = neutral_tokens(tiny, 40, 0)
    assert len({tuple(f) for f in fillers}) == len(fillers) and {len(f) for f in fillers} == {40}
    for text, row in zip(texts, rows, strict=True):
        end = len(frame(tiny)) + len(tiny.text_ids(text))
        assert row.reads == tuple(tuple(range(max(end + d - WINDOW, len(frame(tiny))), end + d)) for d in (0, 12, 40))
        assert list(row.ids[end:]) in fillers and row.ids[:end] == (*frame(tiny), *tiny.text_ids(text))


def test_persistence_compares_with_words_and_shuffled_labels(whole: tuple[Probes, Path]) -> None:
    """Beyond the window no word of the passage is left, so that words are at chance by design; distances beyond the context are named."""
    found = whole[0]
    points = found.persistence["points"]
    assert [point["distance"] for point in points] == [0, 12, 40]
    assert found.notes == ("distances 1024 do not fit the context of tiny-llama (256 tokens)",)
    assert points[0]["fitted"] == points[0]["transferred"] and points[0]["fitted"]["value"] > 0.7
    assert points[0]["lexical"]["value"] > 0.8 and all(point["lexical"]["value"] < 0.5 for point in points[1:])
    assert abs(sum(point["shuffled"]["value"] for point in points) / 3 - 1 / 3) < 0.15


def test_what_is_transferred_was_fitted_at_the_passage_whatever_distances_are_asked_for(
    tiny: Model, whole: tuple[Probes, Path], tmp_path: Path
) -> None:
    found, texts = whole[0], small_texts()
    decay = found.point(found.chosen)["decay"]
    chosen = texts.some(range(len(texts.texts)), SETTINGS.followed // len(texts.labels))
    asked_for = replace(SETTINGS, distances=(12, 40))
    read = persistence(tiny, texts, chosen, parse_site(found.persistence["site"]), decay, tmp_path, asked_for)
    assert read == found.persistence
    assert any(point["transferred"] != point["fitted"] for point in read["points"][1:])


def test_no_fold_holds_out_everything_that_is_followed() -> None:
    """Two prompts fall into the same of four folds one time in four."""
    groups = ["a", "b", "a", "b", "b"]
    for seed in range(20):
        held = held_out(groups, 4, seed)
        assert len(held) == 2 and torch.equal(held.sum(0), torch.ones(5, dtype=torch.int64))
        assert {tuple(row) for row in held.tolist()} == {(True, False, True, False, False), (False, True, False, True, True)}
    many = held_out([f"{i}" for i in range(100)], 4, 0)
    assert len(many) == 4 and many.any(1).all() and torch.equal(many.sum(0), torch.ones(100, dtype=torch.int64))


def test_texts_of_one_prompt_alone_are_not_followed_and_the_notes_say_so(tiny: Model, tmp_path: Path) -> None:
    """There would be nothing to fit to."""
    texts, notes = small_texts(), list[str]()
    one = replace(texts, texts=tuple(replace(text, group="the same") for text in texts.texts))
    assert stage._persistence(tiny, one, replace(SETTINGS, followed=3), Site(0, RESID_POST), 0.1, tmp_path, notes) == {}
    assert len(notes) == 1 and "all replies to one prompt" in notes[0] and not list(tmp_path.iterdir())


def test_the_model_is_asked_by_the_likelihood_of_its_answers(tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = small_texts()
    chosen = texts.some(texts.test, 2)
    answers = asked(tiny, texts, chosen, 1, tmp_path / "answers.jsonl")
    shown = examples(texts, 1)
    assert [label for _, label in shown] == list(texts.labels)
    assert {text for text, _ in shown} <= {texts.texts[i].text for i in texts.train}
    vocab = tiny.tokenizer.get_vocab()
    tokens = [vocab[label] for label in texts.labels]

    def by_hand(text: str, some: list[tuple[str, str]]) -> torch.Tensor:
        ids = tiny.tokenizer.apply_chat_template(
            conversation(texts.labels, some, text), add_generation_prompt=True, tokenize=True, return_dict=False
        )
        with torch.no_grad():
            return tiny.hf(input_ids=torch.tensor([ids])).logits[0, -1][tokens].log_softmax(-1)

    for name, some in ((ZERO, []), (FEW, shown)):
        empty = torch.stack([by_hand(text, some) for text in ("", "N/A", "The", "...")]).mean(0)
        for i, found in zip(chosen[:2], answers[name][:2], strict=True):
            torch.testing.assert_close(found, (by_hand(texts.texts[i].text, some) - empty).softmax(-1), atol=1e-4, rtol=1e-3)
    monkeypatch.setattr("emosteer.probing.prompting.label_log_shares", None)  # nothing is asked twice
    assert torch.equal(asked(tiny, texts, chosen, 1, tmp_path / "answers.jsonl")[FEW], answers[FEW])


def test_examples_that_do_not_fit_the_context_are_refused(tiny: Model, tmp_path: Path) -> None:
    texts = small_texts()
    with pytest.raises(ModelError, match=r"few-shot, a text takes \d+ tokens, and .* 256; lower --shots"):
        asked(tiny, texts, texts.some(texts.test, 2), 6, tmp_path / "answers.jsonl")


def test_labels_that_start_alike_leave_the_asking_out_and_say_so(tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise ModelError("the tokenizer does not tell them apart")

    monkeypatch.setattr(stage, "asked", refuse)
    short = replace(SETTINGS, kinds=(HEADS,), epochs=1, decays=(0.1,))
    found = stage.probe(tiny, small_texts(), short, tmp_path)
    assert not found.prompting and not found.persistence and not found.malleability and found.chosen == HEADS
    assert any("does not tell them apart" in note for note in found.notes) and any("only heads" in note for note in found.notes)


def test_states_are_read_in_shards_that_hold_the_states_of_single_passes(tiny: Model, tmp_path: Path) -> None:
    words = [text.text for text in marked_texts(50)]
    rows = [text_row(tiny, frame(tiny), text, "mean", 24) for text in words]
    site = Site(1, Z)
    states = read_shards(tiny, rows, [site], tmp_path, budget=100, units={str(site): 4})
    assert states.sizes == (SHARD, 150 - SHARD) and states.n == 150 and max(len(index) for index, _ in states.shards(str(site))) == SHARD
    found = torch.cat([values for _, values in states.shards(str(site))])
    assert found.shape == (150, 4, 8) and torch.equal(torch.cat([i for i, _ in states.shards(str(site))]), torch.arange(150))
    for i in (0, 77, 149):
        alone = tiny.read(torch.tensor([rows[i].ids]), [site], bridge=False)[site][0, list(rows[i].reads[0])].mean(0)
        torch.testing.assert_close(found[i].flatten(), alone, atol=1e-4, rtol=1e-3)


def test_a_run_that_was_ended_goes_on_without_reading_again(tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = replace(SETTINGS, kinds=("resid_post",), hidden=0, epochs=3, followed=0, prompted=0, moved=0)
    fit, done = stage._fit, []

    def ended(*arguments: Any) -> stage.Piece:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(1)
        return fit(*arguments)

    monkeypatch.setattr(stage, "_fit", ended)
    with pytest.raises(KeyboardInterrupt):
        stage.probe(tiny, small_texts(), short, tmp_path / "a")
    monkeypatch.setattr(stage, "_fit", fit)
    whole = stage.probe(tiny, small_texts(), short, tmp_path / "b")
    monkeypatch.setattr("emosteer.probing.reading.read_rows", None)
    monkeypatch.setattr(stage, "_fit", lambda *arguments: (done.append(1), fit(*arguments))[1])
    resumed = stage.probe(tiny, small_texts(), short, tmp_path / "a")
    assert len(done) == tiny.shape.n_layers, "the places that were fitted are not fitted again"
    assert resumed.points == whole.points and torch.equal(resumed.weights["resid_post"], whole.weights["resid_post"])
    with pytest.raises(TypeError):  # other settings have progress of their own
        stage.probe(tiny, small_texts(), replace(short, longest=5), tmp_path / "a")


def test_probes_are_read_back_and_nonsense_is_refused(whole: tuple[Probes, Path], tmp_path: Path) -> None:
    path = tmp_path / "probes.safetensors"
    whole[0].save(path)
    again = Probes.load(path)
    again.save(tmp_path / "again.safetensors")
    assert path.read_bytes() == (tmp_path / "again.safetensors").read_bytes()
    assert list(again.best) == list(whole[0].best)
    assert again.point("resid_post") == whole[0].point("resid_post") and again.malleability == whole[0].malleability
    found = artifacts.load(path)
    for change, told in (
        (lambda f, t: f["points"].pop(0), "expected 'points' and 'best'"),
        (lambda f, t: f["best"].pop("heads"), "'best'"),
        (lambda f, t: f["points"][0].update(f1=1.5), "points.0.f1"),
        (lambda f, t: f["best"]["heads"].update(unit=9), "expected 'points' and 'best'"),
        (lambda f, t: f.update(chosen="resid_mid"), "'chosen'"),
        (lambda f, t: f["labels"].append("joy"), "expected 'confusion'"),
        (lambda f, t: t.pop("heads.bias"), "lacks 'heads.bias'"),
    ):
        fields, tensors = json.loads(json.dumps(found.fields)), dict(found.tensors)
        change(fields, tensors)  # type: ignore[no-untyped-call]
        artifacts.save(tmp_path / "wrong", "probes", fields, tensors, found.provenance)
        with pytest.raises(ArtifactError, match=told):
            Probes.load(tmp_path / "wrong")


def test_the_command_writes_prints_and_can_be_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build("llama")
    model.hf.save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    write_jsonl(tmp_path / "texts.jsonl", [{"text": text.text, "label": text.label} for text in marked_texts(30)])
    monkeypatch.chdir(tmp_path)
    small = "--epochs 2 --decays 0.1 --folds 2 --hidden 2 --followed 6 --distances 0,9 --prompted 3 --moved 3 --longest 20"
    small += " --sites heads,resid_post"

    def said(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            cli.main(list(arguments))
        assert not ended.value.code, capsys.readouterr().err
        return capsys.readouterr().out

    told = json.loads(said("probe", "texts.jsonl", "-m", "./tiny", *small.split(), "--json"))
    file = tmp_path / "artifacts/tiny/probes.safetensors"
    assert told["file"] == "artifacts/tiny/probes.safetensors" and not file.with_name(file.name + ".partial").exists()
    first = file.read_bytes()
    command = str(Probes.load(file).provenance.command)
    assert command.startswith("emosteer probe") and "texts.jsonl" in command

    said(*shlex.split(command)[1:])
    assert file.read_bytes() == first
    shown = said("inspect", str(file))
    for part in ("resid_post: test texts", "heads: test texts", "zero-shot", "few-shot", "after so many neutral tokens", "system line"):
        assert part in shown
    assert json.loads(said("inspect", str(file), "--json"))["content"]["points"] == told["points"]


def test_two_runs_of_the_same_command_do_not_share_their_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever comes second is told so, with --fresh, too, and takes nothing from the first; the first one's end leaves alone who began
    in the moment before it."""
    write_tiny_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    command = "probe -m ./tiny --scenarios sev.jsonl --replies bank.jsonl --out p --sites resid_post"
    command += " --epochs 1 --decays 0.1 --folds 2 --hidden 0 --shuffles 2 --followed 0 --prompted 0 --moved 0"

    def ended(*more: str) -> int:
        with pytest.raises(SystemExit) as end:
            cli.main([*command.split(), *more])
        return int(end.value.code or 0)

    partial = tmp_path / "p.partial"
    with kept_progress(partial):
        (partial / "piece").write_text("1")
        for more in ((), ("--fresh",)):
            assert ended(*more) == 1
            assert "p.partial is kept by another run" in capsys.readouterr().err
        assert (partial / "piece").read_text() == "1" and not Path("p").exists()

    saved, others = Probes.save, contextlib.ExitStack()

    def save(self: Probes, path: Path) -> None:
        saved(self, path)
        others.enter_context(kept_progress(partial))

    monkeypatch.setattr(Probes, "save", save)
    with others:
        assert ended() == 0 and (partial / "piece").exists()
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert ended() == 0 and not partial.exists()
