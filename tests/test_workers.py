"""Several processes of one command: the same bytes as one process, whoever did what and whoever died.

Most tests run the processes as threads over torch's in-memory store, each with a model of its own; the last ones really use torchrun.
"""

from __future__ import annotations

import itertools
import math
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed import HashStore
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from emosteer.attribution.ablate import ablate
from emosteer.attribution.settings import AblateSettings, CurveSettings
from emosteer.base import artifacts
from emosteer.base import processes as workers
from emosteer.base.errors import ArtifactError, EmosteerError, UsageError
from emosteer.base.files import write_jsonl
from emosteer.base.jsonl import KeyedLog
from emosteer.base.processes import ALONE, Crew, ShareDone, part, parts
from emosteer.cli import main as cli
from emosteer.directions import extract
from emosteer.directions.contrast import Contrasts, Plan
from emosteer.directions.settings import Settings
from emosteer.generation.decoding import Decoding
from emosteer.models.model import Model
from emosteer.scenarios.scenarios import EMOTIONS
from emosteer.writing import best_of as best_module
from emosteer.writing import writer as writing
from emosteer.writing.contest_writer import ContestWriter, cells_of
from emosteer.writing.jobs import Job
from emosteer.writing.reply_files import shares_of, write_file
from tests.conftest import build, small_data
from tests.helpers import contest_setup

SETTINGS = Settings(EMOTIONS, instruction="", holdout=0.25, batch_tokens=60)
DATA = small_data(4)


def together(count: int, work: Callable[[Crew], Any], store: HashStore | None = None) -> list[Any]:
    """Runs `work` in as many threads as processes are wanted; returns what each returned, or raised."""
    store, found = store or HashStore(), [None] * count

    def one(rank: int) -> None:
        try:
            found[rank] = work(Crew(rank, count, store))
        except BaseException as error:
            found[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 300  # a slow machine is no failure
    while any(thread.is_alive() for thread in threads) and time.monotonic() < end:
        threads[0].join(0.05)
        if any(isinstance(one, Exception) for one in found):
            end = min(end, time.monotonic() + 30)  # the others may wait for whoever died
    if any(thread.is_alive() for thread in threads):
        raise AssertionError("some did not end") from next((one for one in found if isinstance(one, Exception)), None)
    return found


@pytest.fixture(scope="module")
def models() -> list[Model]:
    """Equal models: hooks of one are none of another's."""
    found = [build("llama") for _ in range(3)]
    _ = [model.bridge for model in found]  # booted one after the other
    return found


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint after every batch: none is too early, and writing one takes no time."""
    monkeypatch.setattr(extract, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(extract, "time", SimpleNamespace(monotonic=lambda: 0.0))


# ---- the crew -------------------------------------------------------------------------------------------------------------------


def test_every_item_is_claimed_once_and_the_same_call_means_the_same_list() -> None:
    def work(crew: Crew) -> tuple[list[int], list[int]]:
        first = list(crew.claim(range(50)))
        crew.meet()
        return first, list(crew.claim(range(100, 107)))

    found = together(3, work)
    assert sorted(itertools.chain.from_iterable(first for first, _ in found)) == [*range(50)]
    assert sorted(itertools.chain.from_iterable(second for _, second in found)) == [*range(100, 107)]
    assert list(ALONE.claim("abc")) == ["a", "b", "c"]


def test_nobody_passes_a_meeting_before_all_are_there_and_the_first_finishes_last() -> None:
    seen: list[str] = []

    def work(crew: Crew) -> str:
        threading.Event().wait(0.05 * crew.rank)
        seen.append("before")
        crew.meet()
        seen.append("after")
        if crew.lead:
            crew.tell("write")
            crew.tell("over")
        else:
            assert [crew.hear(), crew.hear()] == ["write", "over"]
            threading.Event().wait(0.05)
            seen.append("share")
        crew.finish()
        return f"merged after {seen.count('share')}"

    found = together(3, work)
    assert seen[:6] == ["before"] * 3 + ["after"] * 3
    assert found[0] == "merged after 2" and all(isinstance(end, ShareDone) for end in found[1:])


def test_a_process_that_falls_silent_or_never_starts_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "PATIENCE", 0.05)
    monkeypatch.setattr(workers, "START", 0.05)
    store = HashStore()
    crew = Crew(0, 2, store)
    crew.kept = lambda: "7 of 9 groups are kept in here"
    with pytest.raises(EmosteerError, match="process 1 of 2 has not started.*7 of 9 groups are kept in here; the same command goes on"):
        crew.meet()
    store.set("emosteer/beat/1", "5")
    with pytest.raises(EmosteerError, match="process 1 of 2 died.*7 of 9 groups are kept in here; the same command goes on"):
        crew.meet()


def test_a_store_that_is_gone_is_a_message() -> None:
    class Gone:
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError("Connection reset by peer")

    with pytest.raises(EmosteerError, match="cannot be reached any more; what was finished is kept"):
        Crew(1, 2, Gone()).meet()


def test_what_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert (workers.rank(), workers.world(), workers.local_rank()) == (0, 1, None)
    workers.refuse("circuit")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert workers.world() == 1  # some launchers set it alone
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert (workers.rank(), workers.world(), workers.local_rank()) == (3, 4, 1)
    workers.refuse("extract")
    with pytest.raises(UsageError, match="`circuit` runs as one process, found 4"):
        workers.refuse("circuit")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    from emosteer.models.devices import resolve_device

    assert str(resolve_device("auto")) == "cuda:1" and str(resolve_device("cpu")) == "cpu"
    monkeypatch.setenv("LOCAL_RANK", "9")
    assert str(resolve_device("auto")) == "cuda:1"


@pytest.mark.parametrize(
    "command", [["generate", "hello", "-e", "anger"], ["generate", "-e", "anger", "--out", "x"], ["circuit"], ["inspect", "x"]]
)
def test_what_cannot_be_split_is_refused_in_one_line(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, lines in ((0, 1), (1, 0)):  # said once
        monkeypatch.setenv("RANK", str(rank))
        with pytest.raises(SystemExit) as stop:
            cli.main(command)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.count("\n") == lines and ("torchrun" in err) == (rank == 0)


def test_parts_are_found_by_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a[1].partial"
    for name in ("a[1].partial", "a[1].partial.rank12", "a[1].partial.rank2", "a[1].partial.rank2.part", "a1.partial.rank3"):
        (tmp_path / name).touch()
    assert {number: file.name for number, file in parts(path).items()} == {
        0: "a[1].partial",
        2: "a[1].partial.rank2",
        12: "a[1].partial.rank12",
    }
    assert part(path, 0) == path and part(path, 2) in parts(path).values()


# ---- sums -----------------------------------------------------------------------------------------------------------------------


def test_sums_are_the_same_bits_however_they_are_divided_and_plain_ones_are_not() -> None:
    """Numbers of very different size, added one by one, against the exact sum."""
    draw = random.Random(0)
    values = [draw.gauss(0, 1) * 10 ** draw.randint(-6, 6) for _ in range(600)]
    plan = Plan(("a", "b"), (), frozenset(), 0)

    def summed(order: list[float]) -> Contrasts:
        found = Contrasts(plan, 1, 2, 2, 2)
        for value in order:
            found._add("resid_rms", torch.full((2,), value, dtype=torch.float64))
        return found

    whole = summed(values)
    shuffled = draw.sample(values, len(values))
    for cut in (1, 200, 599):
        one, other = summed(shuffled[:cut]), summed(shuffled[cut:])
        one.merge(other.state())
        assert one.sums["resid_rms"][0].item() == whole.sums["resid_rms"][0].item() == math.fsum(values)
    assert sum(values) != sum(shuffled)  # a plain sum would have shown the order


# ---- extract ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tiny: Model, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "d.safetensors"
    extract.extract(tiny, DATA[0], SETTINGS, bank=DATA[1]).save(path)
    return path.read_bytes()


def shared(models: list[Model], count: int, checkpoint: Path, dies: dict[int, int] | None = None) -> list[Any]:
    """An extraction by `count` processes. dies: process -> the batch after which it is killed; the others are stopped then."""
    down = threading.Event()

    def work(crew: Crew) -> Any:
        def batch(done: int) -> None:
            if dies and done >= dies.get(crew.rank, 10**6):
                down.set()
            if dies and crew.rank not in dies:
                threading.Event().wait(0.02)  # so that there is something left to do when the other dies
            if down.is_set():
                raise KeyboardInterrupt

        return extract.extract(
            models[crew.rank], DATA[0], SETTINGS, bank=DATA[1], checkpoint=checkpoint, crew=crew, on_batch=batch if dies else None
        )

    return together(count, work)


@pytest.mark.parametrize("count", [2, 3])
def test_directions_by_several_processes_are_the_same_bytes(models: list[Model], whole: bytes, tmp_path: Path, count: int) -> None:
    found = shared(models, count, tmp_path / "c")
    assert all(isinstance(end, ShareDone) for end in found[1:])
    assert len(parts(tmp_path / "c")) == count  # until the result is saved
    found[0].save(tmp_path / "d")
    assert (tmp_path / "d").read_bytes() == whole
    extract.finish_checkpoint(tmp_path / "c")
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


@pytest.mark.parametrize("then", [1, 2, 3])
def test_after_a_death_any_number_of_processes_goes_on(
    models: list[Model], whole: bytes, tmp_path: Path, often: None, then: int, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tmp_path / "c"
    ends = shared(models, 2, checkpoint, {1: 3})
    assert isinstance(ends[1], KeyboardInterrupt) and len(parts(checkpoint)) == 2
    kept = [artifacts.load_fields(path, extract.CHECKPOINT) for path in parts(checkpoint).values()]
    before = sum(len(fields["batches"]) for fields in kept if fields)
    assert before >= 3
    done: list[int] = []
    real = extract.read_states

    def counting(model: Model, samples: Any, *rest: Any, **options: Any) -> Any:
        done.append(1)
        return real(model, samples, *rest, **options)

    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extract, "read_states", counting)
        found = shared(models, then, checkpoint)
    assert "going on after" in capsys.readouterr().err
    found[0].save(tmp_path / "d")
    assert (tmp_path / "d").read_bytes() == whole
    total = len({i for path in parts(checkpoint).values() for i in (artifacts.load_fields(path, extract.CHECKPOINT) or {})["batches"]})
    assert 0 < len(done) <= 12 - before or total > 12  # what was on disk was not computed again


def test_parts_that_overlap_are_refused(tiny: Model, tmp_path: Path, often: None) -> None:
    checkpoint = tmp_path / "c"
    extract.extract(tiny, DATA[0], SETTINGS, bank=DATA[1], checkpoint=checkpoint)
    part(checkpoint, 1).write_bytes(checkpoint.read_bytes())
    ends = together(2, lambda crew: extract.extract(tiny, DATA[0], SETTINGS, bank=DATA[1], checkpoint=checkpoint, crew=crew))
    assert all(isinstance(end, ArtifactError) and "twice" in str(end) for end in ends)


# ---- ablate -------------------------------------------------------------------------------------------------------------------------


def test_scores_and_curves_by_several_processes_are_the_same_bytes(models: list[Model], tiny: Model, tmp_path: Path) -> None:
    directions = extract.extract(tiny, DATA[0], SETTINGS, bank=DATA[1])
    settings = AblateSettings(
        3,
        true_units=6,
        verify_neurons=4,
        effect_prompts=3,
        curves=CurveSettings((0.25,), (), ("zero", "enhance"), n_random=1, n_prompts=2, max_new_tokens=4),
    )

    def run(model: Model, partial: Path, crew: Crew = ALONE) -> Any:
        return ablate(model, directions, DATA[0], settings, bank=DATA[1], partial=partial, crew=crew)

    run(tiny, tmp_path / "p1").save(tmp_path / "one")
    found = together(2, lambda crew: run(models[crew.rank], tmp_path / "p2", crew))
    assert isinstance(found[1], ShareDone)
    found[0].save(tmp_path / "two")
    assert (tmp_path / "two").read_bytes() == (tmp_path / "one").read_bytes()
    assert len(parts(tmp_path / "p2")) == 2
    again = together(3, lambda crew: run(models[crew.rank], tmp_path / "p2", crew))  # all is there, for three as well
    again[0].save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "one").read_bytes()


# ---- generate and evaluate ----------------------------------------------------------------------------------------------------------


def written(model: Model, out: Path, crew: Crew = ALONE, fresh: bool = False, seed: int = 0) -> list[dict[str, Any]]:
    decoding = Decoding(max_new_tokens=6, temperature=0.8, seed=seed)
    writer = writing.Writer(model, None, decoding, "", "prompt", batch_size=5)
    jobs = [Job.of(group, emotion, "prompt", None) for group in DATA[0] for emotion in EMOTIONS[:2]]
    return write_file(writer, jobs, out, fresh=fresh, crew=crew)


def test_replies_by_several_processes_are_the_same_bytes_also_after_a_death(models: list[Model], tiny: Model, tmp_path: Path) -> None:
    one, out = tmp_path / "one.jsonl", tmp_path / "out.jsonl"
    rows = written(tiny, one)
    found = together(3, lambda crew: written(models[crew.rank], out, crew))
    assert found == [rows] * 3 and out.read_bytes() == one.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.jsonl", "out.jsonl"]
    # as if two of three had been killed: a first batch in `out`, others beside it, one of them in part and torn
    lines = one.read_bytes().splitlines(keepends=True)
    for count in (1, 2, 3):
        out.write_bytes(b"".join(lines[:5]))
        share = shares_of(out)
        part(share, 2).write_bytes(b"".join(lines[10:17]) + lines[17][:30])
        part(share, 1).write_bytes(b"".join(lines[20:]))
        asked: list[int] = []
        with pytest.MonkeyPatch.context() as patch:
            real = best_module.generate
            patch.setattr(best_module, "generate", lambda *a, real=real, asked=asked, **o: (asked.append(len(a[1])), real(*a, **o))[1])
            assert together(count, lambda crew: written(models[crew.rank], out, crew)) == [rows] * count
        assert out.read_bytes() == one.read_bytes() and sorted(asked) == [5, 5]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["one.jsonl", "out.jsonl"]


def test_replies_of_other_settings_are_refused_by_all(models: list[Model], tiny: Model, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    written(tiny, out)
    kept = out.read_bytes()
    lead = Crew(0, 2, HashStore())
    lead.meet = lambda: None  # type: ignore[method-assign]
    with pytest.raises(UsageError, match="replies of another run"):
        written(tiny, out, lead, seed=1)
    assert out.read_bytes() == kept


def test_a_contest_by_several_processes_has_the_same_replies(models: list[Model], tmp_path: Path) -> None:
    base = contest_setup.contest(tmp_path / "one", ("none", "circuit"), batch_size=4)
    wanted = cells_of("none", contest_setup.groups(6), {}) + cells_of("circuit", contest_setup.groups(6), {"anger": 2.0, "sadness": 1.0})
    rows = base.write(wanted, "test")
    sizes: dict[int, list[int]] = {0: [], 1: []}

    def work(crew: Crew) -> Any:
        if crew.rank:
            crew.meet()  # the first gathers what is left of earlier runs before the others open their files
        log = KeyedLog(part(tmp_path / "two" / "replies.jsonl", crew.rank))
        mine: ContestWriter = replace(base, model=models[crew.rank], replies=log, crew=crew, _prompts={})
        real = ContestWriter._writing

        def counting(self: ContestWriter, cells: Any) -> Any:
            def write(batch: list[int]) -> Any:
                sizes[crew.rank].append(len(batch))
                threading.Event().wait(0.01)
                return real(self, cells)(batch)

            return write

        object.__setattr__(mine, "_writing", counting.__get__(mine))
        if crew.rank:
            return mine.serve()
        mine.adopt()
        crew.meet()
        found = mine.write(wanted[:6], "first"), mine.write(wanted, "second")
        crew.tell("over")
        return found

    found = together(2, work)
    assert found[1] is None
    assert found[0][0] == rows[:6]
    assert found[0][1] == rows
    assert sizes[0] and sizes[1]
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["replies.jsonl"]


# ---- torchrun -----------------------------------------------------------------------------------------------------------------------

#: What each process runs. Process 1 kills itself in its third batch, when it is told to; process 0 takes its time.
CHILD = """
import os, signal, sys, time
from pathlib import Path
import torch
from emosteer.cli import main as cli
from emosteer.directions import extract

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
extract.CHECKPOINT_SECONDS = 0.0
real, count = extract.read_states, [0]

def slowly(*arguments, **options):
    count[0] += 1
    if sys.argv[1] == "die":
        time.sleep(0.1)
        if os.environ["RANK"] == "1" and count[0] == 3:
            os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments, **options)

extract.read_states = slowly
try:
    cli.main(sys.argv[2].split())
except SystemExit as end:
    if end.code or len(sys.argv) < 4:
        raise
cli.main(sys.argv[3].split())
"""


def torchrun(script: Path, *arguments: str) -> None:
    """As `torchrun --nproc-per-node 2`, without starting Python once more."""
    from torch.distributed.run import main

    main(["--standalone", "--nproc-per-node", "2", str(script), *arguments])


def test_torchrun_two_processes_one_killed_then_the_same_command_again(
    tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    groups, bank = DATA
    tiny.hf.save_pretrained(tmp_path / "tiny")
    tiny.tokenizer.save_pretrained(tmp_path / "tiny")
    scenarios: dict[str, dict[str, Any]] = {}
    for group in groups:
        row = scenarios.setdefault(
            group.key.scenario, {"skeleton_id": group.key.scenario, "theme": group.theme, "scenario": "we wait", "event": {}}
        )
        row["event"][group.key.valence] = group.text
    write_jsonl(tmp_path / "sev.jsonl", [*scenarios.values()])
    rows = [
        {"skeleton_id": key.scenario, "valence": key.valence, "emotion": emotion, "text": text}
        for key, replies in bank.items()
        for emotion, text in replies.items()
    ]
    write_jsonl(tmp_path / "bank.jsonl", rows)
    (tmp_path / "child.py").write_text(CHILD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent.parent), *sys.path]))
    monkeypatch.setenv("EMOSTEER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))  # the same bytes are promised for the same number
    options = "-m ./tiny --scenarios sev.jsonl --replies bank.jsonl --holdout 0.25 --batch-tokens 60"
    write = "generate -m ./tiny -e all --method prompt --input sev.jsonl --batch-size 5 --max-new-tokens 5"
    for command in (f"extract {options} --artifacts two", f"{write} --out one.jsonl"):
        with pytest.raises(SystemExit) as stop:
            cli.main(command.split())
        assert not stop.value.code
    (tmp_path / "two").rename(tmp_path / "one")  # directions keep the command: the same one for all
    capfd.readouterr()

    partial = tmp_path / "two/tiny/directions.safetensors.partial"
    with pytest.raises(ChildFailedError):
        torchrun(tmp_path / "child.py", "die", f"extract {options} --artifacts two")
    err = capfd.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("emosteer")]
    assert len(lines) == 1 and "another process of this run died" in lines[0] and "scenario-events are kept in" in lines[0]
    assert "the same command goes on" in lines[0] and "of 12 scenario-events" in lines[0]
    assert len(parts(partial)) == 2 and not (tmp_path / "two/tiny/directions.safetensors").exists()

    torchrun(tmp_path / "child.py", "live", f"extract {options} --artifacts two", f"{write} --out two.jsonl")
    out, err = capfd.readouterr()
    assert "going on after" in err and out.count("12 groups, reply elicitation") == 1 and out.count("replies -> two.jsonl") == 1
    assert not parts(partial)
    same = [(tmp_path / f"{name}/tiny/directions.safetensors").read_bytes() for name in ("one", "two")]
    assert same[0] == same[1]
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
