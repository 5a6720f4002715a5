"""Recorded steps: a stand-in records on the processor, so that everything but CUDA itself is exercised. No GPU has run the real one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch

from emosteer.generation import cuda_graphs as graphs
from emosteer.generation import engines
from emosteer.generation import kv_cache as cache_module
from emosteer.generation.cuda_graphs import RecordedStep
from emosteer.generation.decoding import Decoding
from emosteer.generation.generate import Request, generate
from emosteer.generation.steering import SteeringPlan
from emosteer.models.model import Model
from emosteer.models.sites import Site
from tests.conftest import build

PROMPTS = ((1, 7, 9, 12, 30, 41, 4), (1, 7, 9, 4), (5, 30, 31, 32, 60, 61, 62, 17, 3, 4), (1,), (1, 70), (8, 8, 9))
REQUESTS = [Request(str(row), prompt) for row, prompt in enumerate(PROMPTS)]


class Recorder:
    """Counts recordings and replays. A replay gets the work, not its result: it must find everything where the recording left it."""

    def __init__(self) -> None:
        self.recordings = self.replays = 0

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        self.recordings += 1
        for _ in range(3):  # as CUDA does it: two runs to warm up, one that is recorded
            work()

        def replay() -> None:
            self.replays += 1
            work()

        return replay


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    found = Recorder()
    monkeypatch.setattr(engines, "recorder_for", lambda device: found)
    return found


def plan_for(model: Model) -> SteeringPlan:
    draw = torch.Generator().manual_seed(5)
    sites = [Site(layer, kind) for layer in range(model.shape.n_layers) for kind in ("attn_out", "mlp_out", "resid_post")]
    return SteeringPlan({site: torch.randn(len(PROMPTS), model.shape.d_model, generator=draw) for site in sites}, len(PROMPTS))


@pytest.mark.parametrize("room", [1, 5, 64])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_recorded_steps_write_what_steps_write(name: str, room: int, monkeypatch: pytest.MonkeyPatch, recorder: Recorder) -> None:
    """Rows end apart, so that recordings go on with idle slots, are given up at half, and made anew; with every room in the cache."""
    monkeypatch.setattr(cache_module, "ROOM", room)
    model = build(name)
    monkeypatch.setitem(model.__dict__, "stop_ids", frozenset())
    plan, decoding = plan_for(model), Decoding(24, repetition_penalty=1.3)
    with monkeypatch.context() as patch:
        patch.setattr(engines, "recorder_for", lambda device: None)
        free = generate(model, REQUESTS, plan, decoding)
        stops = frozenset({free[0].ids[2], free[3].ids[5], free[5].ids[8], free[1].ids[12]})
        patch.setitem(model.__dict__, "stop_ids", stops)
        expected = generate(model, REQUESTS, plan, decoding)
    assert len({reply.n_tokens for reply in expected}) > 2, "rows end apart"
    assert recorder.recordings == 0
    monkeypatch.setitem(model.__dict__, "stop_ids", stops)
    assert generate(model, REQUESTS, plan, decoding) == expected
    assert recorder.recordings >= 1
    if room == 64:
        assert recorder.recordings < 6 and recorder.replays > 20, "recorded again only when half of the slots are idle"


def test_short_replies_and_processors_are_not_recorded(tiny: Model, recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    generate(tiny, REQUESTS, decoding=Decoding(engines.RECORDED - 1))
    assert recorder.recordings == 0
    assert graphs.recorder_for(torch.device("cpu")) is None
    assert graphs.recorder_for(torch.device("cuda")) is not None
    monkeypatch.setenv("EMOSTEER_GRAPHS", "0")
    assert graphs.recorder_for(torch.device("cuda")) is None


@pytest.mark.parametrize("failure", ["wrong", "raises"])
def test_what_cannot_be_recorded_goes_on_without(
    tiny: Model, recorder: Recorder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], failure: str
) -> None:
    def record(work: Callable[[], None]) -> Callable[[], None]:
        recorder.recordings += 1
        if failure == "raises":
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        work()
        return lambda: None  # computes nothing; what is compared was left by the recording

    monkeypatch.setitem(tiny.__dict__, "stop_ids", frozenset())
    with monkeypatch.context() as patch:
        patch.setattr(engines, "recorder_for", lambda device: None)
        expected = generate(tiny, REQUESTS, decoding=Decoding(20))
    monkeypatch.setattr(engines, "recorder_for", lambda device: record)
    assert generate(tiny, REQUESTS, decoding=Decoding(20)) == expected
    assert recorder.recordings == 1, "tried once"
    assert "going on without" in capsys.readouterr().err


def test_a_step_is_recorded_on_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever is current, and whichever was recorded on before: stand-ins for torch.cuda tell where each part runs."""
    now, ran = ["cuda:0"], list[tuple[str, str]]()

    @contextlib.contextmanager
    def on(device: str, what: str) -> Iterator[None]:
        before, now[0] = now[0], device
        ran.append((what, device))
        yield
        now[0] = before

    class Stream:
        def __init__(self) -> None:
            self.device = now[0]

        def wait_stream(self, other: Stream) -> None:
            ran.append(("waits", other.device))

    first = Stream()  # of the device that torch recorded on first: it keeps that
    stand_ins = {
        "device": lambda device: on(str(device), "device"),
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda stream: on(stream.device, "warms up"),
        "CUDAGraph": lambda: SimpleNamespace(replay="replay"),
        "graph": lambda graph, stream=first: on(stream.device, "records"),
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    record = graphs.recorder_for(torch.device("cuda:1"))
    assert record is not None and record(lambda: ran.append(("works", now[0]))) == "replay"  # type: ignore[comparison-overlap]
    assert [what for what, _ in ran] == ["device", "waits", "warms up", "works", "works", "waits", "records", "works"]
    assert {device for _, device in ran} == {"cuda:1"} and now == ["cuda:0"]


def test_a_recording_ends_with_its_cache(tiny: Model) -> None:
    lean = engines.lean_of(tiny)
    assert lean is not None
    cache = cache_module.RowCache(lean.shape, [3, 2], 5, tiny.device, tiny.dtype)
    tokens, positions, added = torch.tensor([4, 5]), torch.tensor([3, 2]), lean.added({})
    with torch.no_grad():
        hidden = lean.step(tokens, positions, cache, added)
        recorded = RecordedStep.proved(lean, cache, tokens, positions, added, hidden, Recorder())
        assert recorded is not None and recorded.fits()
        assert (recorded.mask[1, 0, 0] == 0).tolist() == [False, True, True, True, False, False, False, False]
        for _ in range(4):
            recorded.step(tokens, positions)
    assert not recorded.fits(), "no column is left"
    cache.block = cache.block.clone()
    cache.end = 4
    assert not recorded.fits(), "another block"
