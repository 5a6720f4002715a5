"""A model laid over several devices by accelerate: the same results on the plain tree. One machine has one device here: what is tested is
that accelerate's hooks and ours bear each other, and (on fake devices) that every edit sees activations at home."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from emosteer.base.errors import UsageError
from emosteer.directions.extract import extract
from emosteer.directions.settings import Settings
from emosteer.generation.decoding import Decoding
from emosteer.generation.generate import Request, generate
from emosteer.generation.steering import SteeringPlan
from emosteer.models import devices
from emosteer.models.hooks import at_home
from emosteer.models.model import Model
from emosteer.models.sites import ATTN_OUT, RESID_POST, Site
from emosteer.scenarios.scenarios import EMOTIONS
from tests.conftest import build, small_data

accelerate = pytest.importorskip("accelerate")


@pytest.fixture(scope="module")
def spread() -> Model:
    plain = build("llama")
    names = ["model.embed_tokens", *(f"model.layers.{i}" for i in range(3)), "model.norm", "model.rotary_emb", "lm_head"]
    hf = accelerate.dispatch_model(plain.hf, dict.fromkeys(names, "cpu"), main_device="cpu", force_hooks=True)
    return Model.from_hf(hf, plain.tokenizer, plain.name)


def test_directions_and_replies_are_those_of_the_model_in_one_piece(tiny: Model, spread: Model) -> None:
    assert spread.spread and not tiny.spread
    groups, bank = small_data(2)
    settings = Settings(EMOTIONS, instruction="", holdout=0.25, batch_tokens=1000)
    found, base = (extract(model, groups, settings, bank=bank) for model in (spread, tiny))
    torch.testing.assert_close(found.vectors, base.vectors, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.z.mean, base.z.mean, rtol=1e-4, atol=1e-5)
    assert "bridge" not in spread.__dict__
    requests = [Request(str(i), tuple(tiny.prompt_ids([{"role": "user", "content": group.text}]))) for i, group in enumerate(groups)]
    vector = torch.linspace(-1, 1, 32).expand(len(requests), -1)
    plan = SteeringPlan({Site(1, ATTN_OUT): vector, Site(2, RESID_POST): vector}, len(requests))
    texts = [[reply.text for reply in generate(model, requests, plan, Decoding(max_new_tokens=6))] for model in (spread, tiny)]
    assert texts[0] == texts[1]


def test_an_edit_sees_activations_at_home_and_what_it_returns_goes_back() -> None:
    """On two GPUs that torch pretends to have: tensors without content, but operations across devices are refused as on real ones."""
    with FakeTensorMode():
        vector, activation = torch.ones(3, device="cuda:0"), torch.ones(1, 2, 3, device="cuda:1")
        with pytest.raises(RuntimeError, match="same device"):
            activation + vector
        moved = at_home(lambda found: found + vector, torch.device("cuda:0"))(activation)
        assert moved is not None and str(moved.device) == "cuda:1"
        assert at_home(lambda found: None, torch.device("cuda:0"))(activation) is None


def test_loading_with_a_device_map(tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMOSTEER_CACHE", str(tmp_path / "cache"))
    tiny.hf.save_pretrained(tmp_path / "m")
    tiny.tokenizer.save_pretrained(tmp_path / "m")
    found = Model.load(str(tmp_path / "m"), device_map="auto", dtype="float32")
    assert not found.spread  # one device: nothing to lay out
    ids = torch.arange(1, 9)[None]
    torch.testing.assert_close(found.run(ids, bridge=False), tiny.run(ids, bridge=False))


def test_what_cannot_be_laid_out_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, device, message in (("wide", "auto", "unknown device map 'wide'; expected auto"), ("auto", "cpu", "found both")):
        with pytest.raises(UsageError, match=message):
            devices.check_device_map(name, device)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="needs the package accelerate.*pip install accelerate"):
        devices.check_device_map("auto", "auto")


def test_processes_share_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert devices.own_gpus() == [*range(8)]
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "6"), ("LOCAL_RANK", "2"), ("LOCAL_WORLD_SIZE", "3")):
        monkeypatch.setenv(name, value)
    assert devices.own_gpus() == [4, 5]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "9")
    with pytest.raises(UsageError, match="at most 8 processes"):
        devices.own_gpus()
