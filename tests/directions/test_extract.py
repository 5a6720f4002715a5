"""The stage `extract`: equal to the slow way, and interruptible at any moment without a trace in the result."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from emosteer.base import artifacts
from emosteer.base.artifacts import Provenance
from emosteer.base.errors import ArtifactError, DataError, DegenerateDirection, EmosteerError, OutOfMemory
from emosteer.directions import extract
from emosteer.directions.activations import Sample, read_states, tokenize_group
from emosteer.directions.contrast import make_plan
from emosteer.directions.directions import Directions, from_contrasts
from emosteer.directions.extract import finish_checkpoint
from emosteer.directions.settings import Settings
from emosteer.models.model import Model
from emosteer.models.sites import Site
from emosteer.scenarios.scenarios import EMOTIONS, Bank, Group, GroupKey
from tests.conftest import build, small_data
from tests.directions.test_contrast import all_sites, stream

#: Small batches, so that there are several to be interrupted between.
SETTINGS = Settings(EMOTIONS, instruction="", holdout=0.25, batch_tokens=90)
Data = tuple[list[Group], Bank]

#: What the killed process runs: it saves a checkpoint as often as it can and dies after the fifth batch without any clean-up.
CHILD = """
import os, signal, sys
from pathlib import Path
import torch
from emosteer.directions import extract
from tests.conftest import build, small_data
from tests.directions.test_extract import SETTINGS

torch.set_num_threads(int(sys.argv[2]))
extract.CHECKPOINT_SECONDS = 0.0
groups, bank = small_data(4)
die = lambda done: os.kill(os.getpid(), signal.SIGKILL) if done == 5 else None
extract.extract(build("llama"), groups, SETTINGS, bank=bank, checkpoint=Path(sys.argv[1]), on_batch=die)
"""


@pytest.fixture(scope="module")
def data() -> Data:
    return small_data(4)


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint after every batch: none is too early, and writing one takes no time."""
    monkeypatch.setattr(extract, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(extract, "time", SimpleNamespace(monotonic=lambda: 0.0))


@pytest.fixture(scope="module")
def whole(tiny: Model, data: Data, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file of an extraction that nothing interrupts."""
    path = tmp_path_factory.mktemp("whole") / "directions.safetensors"
    extract.extract(tiny, data[0], SETTINGS, bank=data[1]).save(path)
    return path.read_bytes()


def saved(found: Directions, path: Path) -> bytes:
    found.save(path)
    return path.read_bytes()


def interrupted(model: Model, data: Data, checkpoint: Path, after: int, error: type[BaseException] = KeyboardInterrupt) -> None:
    """Runs until `after` batches are done and is then interrupted; leaves the checkpoint of that moment."""

    def stop(done: int) -> None:
        if done == after:
            raise error

    with pytest.raises(error):
        extract.extract(model, data[0], SETTINGS, bank=data[1], checkpoint=checkpoint, on_batch=stop)
    assert checkpoint.is_file()


# ---- the result ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("elicitation", ["reply", "tone"])
def test_the_stage_equals_the_slow_way(family: Model, data: Data, elicitation: str) -> None:
    """Batched, packed and streamed against one unpacked group at a time."""
    groups, bank = data
    settings = replace(SETTINGS, elicitation=elicitation, batch_tokens=400)
    found = extract.extract(family, groups, settings, bank=bank, data={"bank.jsonl": "12ab"})
    samples = [tokenize_group(family, group, elicitation, EMOTIONS, bank[group.key], "") for group in groups]
    plan = make_plan([(s.key.scenario, s.theme) for s in samples], EMOTIONS, 0.25, 0)
    samples.sort(key=lambda s: s.key.scenario in plan.heldout)
    states = [read_states(family, [s], all_sites(3), packed=False) for s in samples]
    slow = from_contrasts(stream(plan, samples, states), elicitation=elicitation, instruction="", dropped={}, provenance=found.provenance)
    assert (found.n_groups, found.n_heldout, dict(found.dropped)) == (12, 3, {}) == (slow.n_groups, slow.n_heldout, {})
    for name in ("vectors", "norms", "rms", "base", "variance"):
        torch.testing.assert_close(getattr(found, name), getattr(slow, name), rtol=1e-3, atol=1e-4, msg=name)
    for mine, theirs in ((found.z, slow.z), (found.mlp, slow.mlp), (found.evidence, slow.evidence)):
        for name, value in vars(mine).items():
            torch.testing.assert_close(value, getattr(theirs, name), rtol=1e-3, atol=1e-4, msg=name)
    source = found.provenance
    assert (source.model, source.model_sha256, source.data) == (family.name, family.sha256, {"bank.jsonl": "12ab"})
    assert source.params["elicitation"] == found.elicitation == elicitation and source.params["plan"]["heldout"] == sorted(plan.heldout)
    assert source.params["dtype"] == "float32" and source.versions["torch"] == torch.__version__


def test_the_unpacked_path_and_other_batch_sizes_give_the_same_directions(tiny: Model, data: Data) -> None:
    base = extract.extract(tiny, data[0], SETTINGS, bank=data[1])
    for other in (replace(SETTINGS, packed=False), replace(SETTINGS, batch_tokens=1), replace(SETTINGS, batch_tokens=4096)):
        found = extract.extract(tiny, data[0], other, bank=data[1])
        torch.testing.assert_close(found.vectors, base.vectors, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.z.mean, base.z.mean, rtol=1e-4, atol=1e-5)
        assert found.evidence is not None and base.evidence is not None
        assert torch.equal(found.evidence.accuracy, base.evidence.accuracy)


@pytest.mark.parametrize("packed", [True, False])
def test_the_passes_are_packed_or_not_as_the_settings_say(tiny: Model, data: Data, monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
    said: list[object] = []
    real = read_states
    monkeypatch.setattr(extract, "read_states", lambda *args, **options: (said.append(options["packed"]), real(*args, **options))[1])
    extract.extract(tiny, data[0], replace(SETTINGS, packed=packed), bank=data[1])
    assert set(said) == {packed}


def test_held_out_groups_come_last_and_nothing_twice(tiny: Model, data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Sample] = []
    real = extract.Contrasts.update

    def update(self: extract.Contrasts, samples: list[Sample], states: object) -> None:
        seen.extend(samples)
        real(self, samples, states)  # type: ignore[arg-type]

    monkeypatch.setattr(extract.Contrasts, "update", update)
    plan = extract.extract(tiny, data[0], SETTINGS, bank=data[1]).provenance.params["plan"]
    assert sorted(s.key for s in seen) == sorted(group.key for group in data[0])
    assert [s.key.scenario in plan["heldout"] for s in seen] == [False] * 9 + [True] * 3


def test_a_group_that_lacks_an_emotion_is_used_and_one_that_compares_none_is_dropped(tiny: Model, data: Data) -> None:
    groups, bank = data
    bank = {key: dict(replies) for key, replies in bank.items()}
    del bank[groups[0].key]["fear"]
    del bank[groups[4].key]["anger"], bank[groups[4].key]["disgust"]
    del bank[groups[7].key]
    bank[groups[8].key] = {}
    bank[groups[9].key]["boredom"] = "wait wait"  # more than what is needed is no harm
    settings = replace(SETTINGS, holdout=0.0)
    bank[groups[10].key] = {"fear": "run"}
    found = extract.extract(tiny, groups, settings, bank=bank)
    assert found.n_groups == 9 and found.dropped == {"a reply in one emotion alone": 1, "no reply in the bank": 2}
    assert found.incomplete == 2 and found.replies == dict.fromkeys(EMOTIONS, 9) | dict.fromkeys(("fear", "anger", "disgust"), 8)
    rest = [group for index, group in enumerate(groups) if index not in (7, 8, 10)]
    assert torch.equal(extract.extract(tiny, rest, settings, bank=bank).vectors, found.vectors)


def least_squares(rows: list[dict[int, np.ndarray]], n: int) -> np.ndarray:
    """m[e] of `h[g,e] = b[g] + m[e]`, by a design matrix of groups and emotions and numpy. rows: per group, emotion -> state."""
    design, states = [], []
    for g, row in enumerate(rows):
        for e, state in row.items():
            design.append(np.concatenate([np.eye(len(rows))[g], np.eye(n)[e]]))
            states.append(state)
    fit = np.linalg.lstsq(np.array(design), np.array(states), rcond=None)[0][len(rows) :]
    return fit - fit.mean(0)


@pytest.mark.parametrize("packed", [True, False])
def test_directions_of_incomplete_groups_are_the_least_squares_fit(tiny: Model, data: Data, packed: bool) -> None:
    """Against a fit by numpy to the states of every reply, each read alone."""
    groups, bank = data[0], {key: dict(replies) for key, replies in data[1].items()}
    draw = random.Random(4)
    for group in groups[:9]:
        for emotion in draw.sample(EMOTIONS, draw.randint(1, 4)):
            del bank[group.key][emotion]
    found = extract.extract(tiny, groups, replace(SETTINGS, holdout=0.0, packed=packed), bank=bank)
    assert (found.n_groups, found.incomplete) == (12, 9) and len(set(found.replies.values())) > 2
    rows: dict[Site, list[dict[int, np.ndarray]]] = {site: [] for site in all_sites(3)}
    for group in groups:
        sample = tokenize_group(tiny, group, "reply", EMOTIONS, bank[group.key], "")
        states = read_states(tiny, [sample], all_sites(3), packed=False)
        for site, kept in rows.items():
            kept.append(dict(zip(sample.held, states[site][0].double().numpy(), strict=True)))
    for index, site in enumerate(found.sites):
        fit = least_squares(rows[site], 6)
        np.testing.assert_allclose(found.vectors[:, index] * found.norms[:, index, None], fit, rtol=1e-3, atol=1e-5)
    for layer in range(3):
        np.testing.assert_allclose(found.z.mean[:, layer], least_squares(rows[Site(layer, "z")], 6), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(found.mlp.mean[:, layer], least_squares(rows[Site(layer, "mlp_post")], 6), rtol=1e-3, atol=1e-5)


def test_what_cannot_be_compared_is_refused_with_what_the_bank_holds(tiny: Model, data: Data) -> None:
    groups = data[0]

    def said(bank: Bank, settings: Settings = SETTINGS) -> str:
        with pytest.raises(DataError) as caught:
            extract.extract(tiny, groups, settings, bank=bank)
        return str(caught.value)

    others: Bank = {group.key: {"joy": "dance", "anger": "slam", "neutral": "wait"} for group in groups}
    message = "no reply in sadness, happiness, fear, surprise, disgust: the bank's replies to these events are in joy (12), anger (12); "
    assert said(others) == message + "choose among these with --emotions"
    apart: Bank = {group.key: {e: "no " + e for e in (EMOTIONS[:4] if i % 2 else EMOTIONS[4:])} for i, group in enumerate(groups)}
    assert said(apart).startswith("no scenario-event has a reply in surprise, disgust beside one in the other emotions")


def test_without_any_reply_the_error_says_what_to_check(tiny: Model, data: Data) -> None:
    for bank in (None, {}, {GroupKey("other", "neutral"): {"anger": "no"}}):
        with pytest.raises(DataError, match="none of the 12 scenario-events has a reply in the bank; .*skeleton_id"):
            extract.extract(tiny, data[0], SETTINGS, bank=bank)


@pytest.mark.parametrize("packed", [True, False])
def test_identical_replies_are_a_degenerate_direction_and_not_scaled_up_rounding(tiny: Model, data: Data, packed: bool) -> None:
    bank = {key: dict.fromkeys(EMOTIONS, "please stop it now") for key in data[1]}
    with pytest.raises(DegenerateDirection, match="tells them apart"):
        extract.extract(tiny, data[0], replace(SETTINGS, packed=packed), bank=bank)


def test_every_valence_of_a_scenario_counts(tiny: Model, data: Data) -> None:
    """Three valences of one scenario: the mean contrast is the mean of the three, not the last one's."""
    groups, settings = data[0][:3], replace(SETTINGS, holdout=0.0)
    assert len({group.key.scenario for group in groups}) == 1

    def contrast(some: list[Group]) -> torch.Tensor:
        found = extract.extract(tiny, some, settings, bank=data[1])
        assert found.n_groups == len(some)
        return found.vectors * found.norms[..., None]

    each = torch.stack([contrast([group]) for group in groups])
    torch.testing.assert_close(contrast(groups), each.mean(0), rtol=1e-4, atol=1e-4)
    assert (each[2] - each.mean(0)).abs().max() > 0.1


def test_a_batch_that_does_not_fit_is_halved_and_gives_the_same(
    tiny: Model, data: Data, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = replace(SETTINGS, batch_tokens=400)
    base = extract.extract(tiny, data[0], settings, bank=data[1])
    limit, real = 2, read_states

    def small(model: Model, samples: list[Sample], *args: object, **options: object) -> object:
        if len(samples) > limit:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return real(model, samples, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(extract, "read_states", small)
    found = extract.extract(tiny, data[0], settings, bank=data[1])
    assert found.n_groups == 12
    torch.testing.assert_close(found.vectors, base.vectors, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.mlp.mean, base.mlp.mean, rtol=1e-4, atol=1e-5)
    assert "out of memory: the batch of" in capsys.readouterr().err
    limit = 0
    with pytest.raises(OutOfMemory):
        extract.extract(tiny, data[0], settings, bank=data[1])


# ---- interrupted ------------------------------------------------------------------------------------------------------------


def test_a_run_that_was_killed_goes_on_to_the_same_bytes(
    tiny: Model, data: Data, whole: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tmp_path / "checkpoint"
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(checkpoint), str(torch.get_num_threads())],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert checkpoint.is_file()
    batches: list[int] = []
    found = extract.extract(tiny, data[0], SETTINGS, bank=data[1], checkpoint=checkpoint, on_batch=batches.append)
    assert 1 < batches[0] <= 6 and batches[-1] > 6  # it went on, and there was something left to do
    assert "going on after" in capsys.readouterr().err
    assert saved(found, tmp_path / "directions.safetensors") == whole


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ZeroDivisionError])
@pytest.mark.parametrize("after", [1, 4])
def test_a_run_that_was_interrupted_goes_on_to_the_same_bytes(
    tiny: Model, data: Data, whole: bytes, tmp_path: Path, often: None, error: type[BaseException], after: int
) -> None:
    checkpoint = tmp_path / "deep" / "checkpoint"
    interrupted(tiny, data, checkpoint, after, error)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny.hf.modules())
    batches: list[int] = []
    found = extract.extract(tiny, data[0], SETTINGS, bank=data[1], checkpoint=checkpoint, on_batch=batches.append)
    assert batches[0] == after + 1 and batches == [*range(after + 1, batches[-1] + 1)]
    assert saved(found, tmp_path / "directions.safetensors") == whole


def test_a_run_interrupted_again_and_again_ends_with_the_same_bytes(
    tiny: Model, data: Data, whole: bytes, tmp_path: Path, often: None
) -> None:
    for after in (1, 2, 3, 5):
        interrupted(tiny, data, tmp_path / "checkpoint", after)
    found = extract.extract(tiny, data[0], SETTINGS, bank=data[1], checkpoint=tmp_path / "checkpoint")
    assert saved(found, tmp_path / "directions.safetensors") == whole


def test_the_checkpoint_outlives_the_result_until_it_is_finished(
    tiny: Model, data: Data, whole: bytes, tmp_path: Path, often: None
) -> None:
    """A process that dies between the last batch and the saved file repeats at most the last batch."""
    checkpoint = tmp_path / "checkpoint"
    total: list[int] = []
    extract.extract(tiny, data[0], SETTINGS, bank=data[1], checkpoint=checkpoint, on_batch=total.append)
    assert checkpoint.is_file()
    again: list[int] = []
    found = extract.extract(tiny, data[0], SETTINGS, bank=data[1], checkpoint=checkpoint, on_batch=again.append)
    assert again == total[-1:]
    assert saved(found, tmp_path / "directions.safetensors") == whole
    finish_checkpoint(checkpoint)
    assert not checkpoint.exists() and sorted(p.name for p in tmp_path.iterdir()) == ["directions.safetensors"]
    finish_checkpoint(checkpoint)  # nothing there: nothing to do
    with pytest.raises(EmosteerError, match="cannot remove the finished checkpoint"):
        finish_checkpoint(tmp_path)


def test_an_interruption_while_the_checkpoint_is_written_leaves_the_one_before(
    tiny: Model, data: Data, whole: bytes, tmp_path: Path, often: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, writes, real = tmp_path / "checkpoint", [], artifacts.save_file

    def torn(tensors: object, path: Path, **options: object) -> None:
        writes.append(path)
        if len(writes) == 3:
            path.write_bytes(b"half of it")
            raise KeyboardInterrupt
        real(tensors, path, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(artifacts, "save_file", torn)
    with pytest.raises(KeyboardInterrupt):
        extract.extract(tiny, data[0], SETTINGS, bank=data[1], checkpoint=checkpoint)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]  # and no scraps
    batches: list[int] = []
    found = extract.extract(tiny, data[0], SETTINGS, bank=data[1], checkpoint=checkpoint, on_batch=batches.append)
    assert batches[0] == 3
    assert saved(found, tmp_path / "directions.safetensors") == whole


def other_reply(data: Data) -> Data:
    key = data[0][5].key
    return data[0], {**data[1], key: {**data[1][key], "fear": data[1][key]["fear"] + " again"}}


def other_theme(data: Data) -> Data:
    return [replace(group, theme="theme1") if index == 0 else group for index, group in enumerate(data[0])], data[1]


CHANGES: dict[str, tuple[Settings, Callable[[Data], Data]]] = {
    "seed": (replace(SETTINGS, seed=1), lambda data: data),
    "holdout": (replace(SETTINGS, holdout=0.5), lambda data: data),
    "instruction": (replace(SETTINGS, instruction="keep two sentences"), lambda data: data),
    "batches": (replace(SETTINGS, batch_tokens=200), lambda data: data),
    "packed": (replace(SETTINGS, packed=False), lambda data: data),
    "emotions": (replace(SETTINGS, emotions=EMOTIONS[::-1]), lambda data: data),
    "elicitation": (replace(SETTINGS, elicitation="tone"), lambda data: data),
    "a reply": (SETTINGS, other_reply),
    "a theme": (SETTINGS, other_theme),
    "fewer groups": (SETTINGS, lambda data: (data[0][:-1], data[1])),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_checkpoint_of_something_else_is_not_used(
    tiny: Model, data: Data, tmp_path: Path, often: None, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, changed = CHANGES[change][0], CHANGES[change][1](data)
    interrupted(tiny, data, tmp_path / "checkpoint", 3)
    batches: list[int] = []
    found = extract.extract(tiny, changed[0], settings, bank=changed[1], checkpoint=tmp_path / "checkpoint", on_batch=batches.append)
    assert batches[0] == 1 and "starting over" in capsys.readouterr().err
    clean = extract.extract(tiny, changed[0], settings, bank=changed[1])
    assert saved(found, tmp_path / "a") == saved(clean, tmp_path / "b")


def test_a_checkpoint_of_other_weights_is_not_used(tiny: Model, data: Data, tmp_path: Path, often: None) -> None:
    other = build("llama", seed=1)
    assert other.sha256 != tiny.sha256
    interrupted(tiny, data, tmp_path / "checkpoint", 3)
    batches: list[int] = []
    extract.extract(other, data[0], SETTINGS, bank=data[1], checkpoint=tmp_path / "checkpoint", on_batch=batches.append)
    assert batches[0] == 1


def test_a_fresh_start_does_not_look_at_the_checkpoint(tiny: Model, data: Data, whole: bytes, tmp_path: Path, often: None) -> None:
    interrupted(tiny, data, tmp_path / "checkpoint", 3)
    batches: list[int] = []
    found = extract.extract(tiny, data[0], SETTINGS, bank=data[1], checkpoint=tmp_path / "checkpoint", fresh=True, on_batch=batches.append)
    assert batches[0] == 1
    assert saved(found, tmp_path / "directions.safetensors") == whole


def test_a_damaged_checkpoint_is_not_used(
    tiny: Model, data: Data, whole: bytes, tmp_path: Path, often: None, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tmp_path / "checkpoint"
    interrupted(tiny, data, checkpoint, 3)
    good = checkpoint.read_bytes()
    artifacts.save(tmp_path / "other", "scores", {}, {"x": torch.ones(1)}, Provenance("m", "", "", "t"))
    other, bare = (tmp_path / "other").read_bytes(), tmp_path / "bare"
    artifacts.save(bare, extract.CHECKPOINT, {}, {"x": torch.ones(1)}, Provenance("m", "", "", "t"))  # without its fields
    for bad in (good[:-1], good[: len(good) // 2], good[:100], good[:5], b"", b"PK\x03\x04", other, bare.read_bytes()):
        checkpoint.write_bytes(bad)
        batches: list[int] = []
        found = extract.extract(tiny, data[0], SETTINGS, bank=data[1], checkpoint=checkpoint, on_batch=batches.append)
        assert batches[0] == 1 and "starting over" in capsys.readouterr().err
        assert saved(found, tmp_path / "directions.safetensors") == whole
    with pytest.raises(ArtifactError, match="expected an artefact of kind 'directions'"):
        Directions.load(checkpoint)  # a checkpoint is not taken for a result


def test_checkpoints_cost_little_time(tiny: Model, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a write that took t, the next one waits for 20 t at least: a few percent."""
    now, written = [0.0], []

    def write(*_: object) -> None:
        written.append(now[0])
        now[0] += 10.0  # a slow disk

    monkeypatch.setattr(extract, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(extract, "_write_checkpoint", write)

    def batch_done(_: int) -> None:
        now[0] += 25.0

    settings = replace(SETTINGS, batch_tokens=1)
    extract.extract(tiny, data[0], settings, bank=data[1], checkpoint=tmp_path / "c", on_batch=batch_done)
    assert written == [25.0, 235.0]  # 12 batches of 25 s: after the second, at 35 s, no write before 235 s
