"""What a command says before it begins holds: the counts are those of the work, and the time is that of a measured run within a factor."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from emosteer.api.costs import memory, stages, trials
from emosteer.api.costs.cost import Cost, Part, amount, of_author, spoken
from emosteer.api.costs.replies import of_effects
from emosteer.attribution.settings import AblateSettings, CurveSettings
from emosteer.circuits.validation.validation import Validation
from emosteer.cli import main as cli
from emosteer.directions.extract import extract, finish_checkpoint, work_of
from emosteer.directions.settings import Settings
from emosteer.models.model import Model
from emosteer.scenarios.scenarios import EMOTIONS
from emosteer.side_effects.measure import effects
from emosteer.side_effects.settings import EffectsSettings
from tests.conftest import SIZES, small_data, tiny_tokenizer
from tests.helpers.dialled import dialled_circuit
from tests.helpers.effects_setup import read_by_words, small_battery
from tests.helpers.tiny_project import EMOTIONS as THREE
from tests.helpers.tiny_project import write_tiny_project

#: How far a time may be off: twofold, and as much again for other work on the machine between the trial and the run.
FACTOR = 4.0


@pytest.fixture(scope="module")
def heavy() -> Model:
    """A random model whose passes take milliseconds, so that a time can be told from noise."""
    torch.manual_seed(0)
    config = LlamaConfig(**{**SIZES, "hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8})
    return Model.from_hf(LlamaForCausalLM(config), tiny_tokenizer(), "heavy")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, scenarios, a bank, and directions."""
    root = tmp_path_factory.mktemp("costs")
    write_tiny_project(root)
    return root


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command line in the folder; returns exit code, stdout, stderr."""
    monkeypatch.chdir(folder)

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            cli.main(list(arguments))
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return call


# ---- counts and times ------------------------------------------------------------------------------------------------------------


def test_the_time_of_an_extraction_is_that_of_a_run(heavy: Model) -> None:
    groups, bank = small_data(24)
    settings = Settings(EMOTIONS, batch_tokens=256)
    cost = stages.of_extract(heavy, groups, settings, bank)
    begin = time.perf_counter()
    extract(heavy, groups, settings, bank=bank)
    took = time.perf_counter() - begin
    assert cost.seconds is not None and took / FACTOR < cost.seconds < took * FACTOR, (cost.line, took)


def test_the_passes_and_tokens_are_those_that_are_read_and_what_is_kept_is_left_out(tiny: Model, tmp_path: Path) -> None:
    groups, bank = small_data(12)
    settings, checkpoint = Settings(EMOTIONS, batch_tokens=256), tmp_path / "d.partial"
    passes: list[int] = []
    tokens: list[int] = []
    real = tiny.run

    def counting(ids: torch.Tensor, *args: Any, **more: Any) -> torch.Tensor:
        tokens.append(int(ids.numel()))
        return real(ids, *args, **more)

    whole = stages.of_extract(tiny, groups, settings, bank, checkpoint)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "run", counting)
        extract(tiny, groups, settings, bank=bank, on_batch=passes.append)
    assert whole.parts[0].count == len(passes) == len(tokens) and not whole.kept
    assert whole.parts[0].tokens <= sum(tokens) < 1.5 * whole.parts[0].tokens, "but for padding"

    class Stop(Exception):
        pass

    def stop(done: int) -> None:
        if done == 2:
            raise Stop

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr("emosteer.directions.extract.CHECKPOINT_SECONDS", 0.0)
        extract(tiny, groups, settings, bank=bank, checkpoint=checkpoint, on_batch=stop)
    kept = len(work_of(tiny, groups, settings, bank).kept(checkpoint))
    rest = stages.of_extract(tiny, groups, settings, bank, checkpoint)
    assert kept and rest.parts[0].count == len(passes) - kept and rest.kept == f"{kept} of {len(passes)} passes are kept"
    finish_checkpoint(checkpoint)


def test_the_points_of_the_curves_are_those_that_are_measured(tiny: Model) -> None:
    groups, bank = small_data(12)
    directions = extract(tiny, groups, Settings(EMOTIONS), bank=bank)
    curves = CurveSettings(shares=(0.25,), kinds=("zero",), n_random=1, n_prompts=2, max_new_tokens=4)
    settings = AblateSettings(patch_groups=2, true_units=4, verify_prompts=0, effect_prompts=2, curves=curves)
    parts = {part.what.split(",")[0]: part for part in stages.of_ablate(tiny, directions, groups, settings, bank).parts}
    from emosteer.attribution.ablate import ablate

    scores = ablate(tiny, directions, groups, settings, bank=bank)
    points = {(row["kind"], row["unit"], row["share"], row["who"]) for row in scores.curves}
    assert parts["points of curves"].count == len(points) and parts["prompts with gradients"].count == 2
    assert all(part.seconds is not None and part.seconds > 0 for part in parts.values())


def test_a_trial_that_does_not_fit_in_memory_gives_no_time_and_other_errors_are_told() -> None:
    def broken(error: Exception) -> Callable[[], None]:
        def run() -> None:
            raise error

        return run

    assert trials.timed(broken(RuntimeError("CUDA out of memory"))) is None
    with pytest.raises(RuntimeError, match="shapes"):
        trials.timed(broken(RuntimeError("shapes differ")))
    assert trials.times(3, None) is None and trials.plus(1.0, None) is None and trials.plus(1.0, 2.0) == 3.0


def test_the_memory_counts_what_the_process_has_had_and_on_a_gpu_only_what_is_reckoned(
    tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = bytearray(2**27)
    held[:: 2**12] = b"x" * 2**15  # every page of it
    assert 2**27 < memory.peak() < 2**40 and len(held) == 2**27
    with monkeypatch.context() as patch:
        patch.setattr(memory, "peak", lambda: 2**40)
        groups, bank = small_data(6)
        assert stages.of_extract(tiny, groups, Settings(EMOTIONS), bank).memory == 2**40
        assert memory.needed(tiny, "extract", 5) == 2**40 + 5
    monkeypatch.setattr(Model, "device", property(lambda self: torch.device("cuda")))
    assert memory.needed(tiny, "extract", 5) == memory.memory_of(tiny)["extract"] + 5


# ---- words -----------------------------------------------------------------------------------------------------------------------


def test_a_cost_is_one_line_and_one_object() -> None:
    cost = Cost(
        "extract", (Part("passes", 120, 98_304, 61.0), Part("replies", 4, 0, 2.0, at_most=True)), 2**31, 5 * 2**20, "3 kept", ("x",)
    )
    assert cost.line == (
        "extract: 120 passes (98,304 tokens), at most 4 replies; up to about 63 s here; 2.0 GiB of memory; writes 5 MiB; 3 kept; x"
    )
    assert cost.as_json()["seconds"] == 63.0 and cost.as_json()["parts"][0]["tokens"] == 98_304
    assert Cost("probe", (Part("texts", 0),)).line == "probe: nothing left to do; about a second here"
    assert Cost("probe", (Part("texts", 3),)).line.endswith("how long is not known before the first of them")
    assert [spoken(s) for s in (0.2, 59.6, 600, 7200)] == ["a second", "60 s", "10 min", "2.0 h"]
    assert amount(10) == "1 MiB" and amount(3 * 2**30) == "3.0 GiB"
    assert of_author(40, 40, 4, 512, True).seconds == 0 and of_author(40, 0, 4, 512, True).seconds is None


# ---- commands --------------------------------------------------------------------------------------------------------------------

DATA = ("-m", "./tiny", "--scenarios", "sev.jsonl", "--replies", "bank.jsonl")


def test_a_dry_run_says_what_would_be_done_and_does_nothing_and_a_run_says_it_before_and_after(
    run: Callable[..., Any], folder: Path
) -> None:
    options = (*DATA, "--emotions", ",".join(THREE), "--holdout", "0.2")
    before = sorted(folder.rglob("*"))
    code, out, err = run("extract", *options, "--dry-run")
    assert (code, err) == (0, "") and out.startswith("extract: ") and out.count("\n") == 1
    found = json.loads(run("extract", *options, "--dry-run", "--json")[1])
    assert found["command"] == "extract" and found["parts"][0]["count"] > 0 and sorted(folder.rglob("*")) == before
    code, _, err = run("extract", *options)
    lines = err.splitlines()
    assert code == 0 and lines[0].startswith("extract: ") and lines[-1].startswith("extract took ")
    small = ("--gain-steps", "2", "--strength", "1")
    ablate = ("--shares", "0.25", "--prompts", "1", "--randoms", "1", "--kinds", "zero", "--verify-prompts", "0")
    commands = (("circuit", *DATA, *small), ("ablate", *DATA, *ablate), ("probe", *DATA, "--epochs", "2"))
    for command in (*commands, ("build", "--author", "--domain", "x", "--out", "new.jsonl", "--model", "./tiny")):
        before = sorted(folder.rglob("*"))
        code, out, err = run(*command, "--dry-run", "--json")
        found = json.loads(out)
        assert code == 0 and found["command"].startswith(command[0]) and sum(part["count"] for part in found["parts"]) > 0
        assert sorted(folder.rglob("*")) == before, "nothing was written"
    assert run("build", "sev.jsonl", "--dry-run")[0] == 2


@pytest.fixture
def small_circuit(run: Callable[..., Any], folder: Path) -> Path:
    """A circuit of the tiny model."""
    made = folder / "artifacts" / "tiny" / "circuit.safetensors"
    if not made.exists():
        assert run("extract", *DATA, "--emotions", ",".join(THREE), "--holdout", "0.2")[0] == 0
        assert run("circuit", *DATA, "--gain-steps", "0", "--heads", "0.25", "--strength", "1", "--no-tune")[0] == 0
    return made


def test_writing_commands_count_replies_and_readings_and_leave_no_file(run: Callable[..., Any], folder: Path, small_circuit: Path) -> None:
    before = sorted(folder.rglob("*.json*"))
    judged = ("-m", "./tiny", "--judge", "linear", "--max-new-tokens", "4", "--dry-run", "--json")
    code, out, _ = run("calibrate", *judged, "--groups", "8", "--points", "3", "--refine", "1")
    assert code == 0 and [part["count"] for part in json.loads(out)["parts"]] == [8 * (1 + 3 * 5)] * 2, "with examples two more"
    code, out, _ = run("calibrate", *judged, "--groups", "8", "--points", "3", "--refine", "1", "--examples", "none")
    assert code == 0 and [part["count"] for part in json.loads(out)["parts"]] == [8 * (1 + 3 * 3)] * 2
    code, out, _ = run("evaluate", *judged, "--groups", "8", "--dev-groups", "8", "--doses", "1,2", "--methods", "none,circuit")
    assert code == 0 and json.loads(out)["parts"][0]["count"] == 8 * (1 + 2 * 3) + 8 * (1 + 3)
    assert sorted(folder.rglob("*.json*")) == before


def test_what_an_earlier_run_kept_counts_where_its_settings_were_the_same(
    run: Callable[..., Any], folder: Path, small_circuit: Path
) -> None:
    judged = ("-m", "./tiny", "--judge", "linear", "--max-new-tokens", "4", "--json")
    dial = ("calibrate", *judged, "--groups", "2", "--points", "2", "--refine", "0", "--circuit", "dialled.safetensors")
    dial = (*dial, "--examples", "none")  # of the weak strengths before the first step fewer may be written than are counted
    contest = ("evaluate", *judged, "--groups", "2", "--dev-groups", "2", "--doses", "1", "--methods", "none,circuit", "--out", "contest")
    (folder / "dialled.safetensors").write_bytes(small_circuit.read_bytes())
    for command in (dial, contest):
        assert run(*command)[0] == 0
        left = {
            name: json.loads(run(*command, *more, "--dry-run")[1])["parts"][0]["count"]
            for name, more in {"same": (), "other": ("--guidance", "3"), **({"fresh": ("--fresh",)} if command is dial else {})}.items()
        }
        assert left["same"] == 0 and left["other"] > 2, command
        assert left.get("fresh", left["other"]) == left["other"], "what is to be written again is not kept"
    assert any(folder.glob("dialled.calibration.jsonl")), "a dry run removes nothing"


def test_the_first_reply_of_a_new_model_is_promised(folder: Path, tiny: Model) -> None:
    from emosteer.api.estimates import first_reply
    from emosteer.scenarios.shipped import read_data

    data = read_data(None, None, limit=6)
    costs = first_reply(tiny, data, EMOTIONS, folder / "none.partial", extracted=False)
    assert [cost.command for cost in costs] == ["extract", "circuit"] and all(cost.seconds for cost in costs)
    assert [cost.command for cost in first_reply(tiny, data, EMOTIONS, folder / "none.partial", extracted=True)] == ["circuit"]


def test_generate_counts_what_is_not_written_yet_and_says_it_for_more_than_a_batch(
    run: Callable[..., Any], folder: Path, small_circuit: Path
) -> None:
    (folder / "asked.jsonl").write_text("".join(json.dumps({"id": f"q{i}", "text": f"Train {i} is late."}) + "\n" for i in range(12)))
    options = ("generate", "-m", "./tiny", "--input", "asked.jsonl", "--emotion", "all", "--max-new-tokens", "3", "--out", "said.jsonl")
    before = sorted(folder.rglob("*"))
    code, out, _ = run(*options, "--dry-run", "--json")
    found = json.loads(out)
    assert code == 0 and found["parts"][0]["count"] == 36 and found["seconds"] > 0
    assert sorted(folder.rglob("*")) == before, "nothing was written"
    code, _, err = run(*options)
    assert code == 0 and err.splitlines()[0].startswith("generate: at most 36 replies")
    found = json.loads(run(*options, "--dry-run", "--json")[1])
    assert found["parts"][0]["count"] == 0 and found["kept"] == "36 of 36 replies are kept"
    assert json.loads(run(*options, "--dry-run", "--json", "--fresh")[1])["parts"][0]["count"] == 36
    code, _, err = run(*options, "--temperature", "0.5", "--dry-run")
    assert code == 2 and "said.jsonl holds replies of another run" in err, "refused as the run itself would be"
    assert run(*options, "--dry-run", "--engine", "vllm")[0] == 2
    few = run("generate", "Hi.", "-m", "./tiny", "--emotion", "all", "--max-new-tokens", "3", "--batch-size", "1")
    assert few[0] == 0 and "took" not in few[2], "a few replies are written without an announcement"


def test_a_dry_run_of_auto_says_what_making_a_circuit_takes(run: Callable[..., Any], folder: Path) -> None:
    code, out, _ = run("generate", "Hi.", "-e", "fear", "-m", "./tiny", "--artifacts", "new", "--auto", "--dry-run", "--json")
    found = json.loads(out)
    assert code == 0 and found["command"] == "generate --auto" and {"passes", "passes that measure"} <= {p["what"] for p in found["parts"]}
    assert not (folder / "new").exists()


def test_judge_counts_different_texts_that_are_not_judged_yet(run: Callable[..., Any], folder: Path) -> None:
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": f"So much for {i % 7}."}) + "\n" for i in range(9)))
    options = ("judge", "texts.jsonl", "--judge", "linear", "--out", "judged.jsonl")
    found = json.loads(run(*options, "--dry-run", "--json")[1])
    assert [part["count"] for part in found["parts"]] == [7, 7] and not (folder / "judged.jsonl").exists()
    assert run(*options)[0] == 0
    found = json.loads(run(*options, "--dry-run", "--json")[1])
    assert found["parts"][0]["count"] == 0 and found["kept"] == "7 of 7 texts are judged"
    code, _, err = run("judge", "texts.jsonl", "--judge", "public", "--out", "judged.jsonl", "--dry-run")
    assert code == 2 and "judged.jsonl holds something else than verdicts of this judge" in err
    assert run(*options, "--by-hand", "--dry-run")[0] == 2


def test_the_studies_of_a_circuit_count_their_work_and_write_nothing(run: Callable[..., Any], folder: Path, small_circuit: Path) -> None:
    before = sorted(folder.rglob("*"))
    code, out, _ = run("heads", *DATA, "--described", "2", "--nodes", "4", "--checked", "6", "--groups", "5", "--dry-run", "--json")
    counts = {part["what"]: part["count"] for part in json.loads(out)["parts"]}
    assert code == 0 and counts["pages"] == 2 * len(THREE) and counts["edges patched"] <= 6
    assert next(count for what, count in counts.items() if what.startswith("prompts with")) == 5
    validate = ("validate", *DATA, "--quick", "--prompts", "2", "--randoms", "2")
    code, out, _ = run(*validate, "--written", "1", "--judge", "linear", "--dry-run", "--json")
    parts = json.loads(out)["parts"]
    assert code == 0 and all(part["count"] > 0 and part["seconds"] > 0 for part in parts) and len(parts) == 3
    assert sorted(folder.rglob("*")) == before
    assert run(*validate)[0] == 0
    made = Validation.load(folder / "artifacts" / "tiny" / "validation.safetensors")
    assert parts[1]["count"] == 2 * (len(made.followed) + len(made.read)), "the trials are those that are run"


def test_the_replies_and_texts_of_the_side_effects_are_those_that_are_kept(tiny: Model, tmp_path: Path) -> None:
    circuit, battery = dialled_circuit(tiny, THREE), small_battery()
    settings = EffectsSettings(
        methods=("circuit", "prompt-tone", "encouraging"), intensities=(50.0,), item_tokens=4, reply_tokens=4, rounds=0, followed=0
    )
    cost = of_effects(tiny, circuit, battery, settings, 8)
    answers, replies, texts, *rest = [part.count for part in cost.parts]
    assert rest == [0, 0] and all(part.seconds for part in cost.parts[:3]) and not cost.kept
    effects(tiny, circuit, "c" * 64, battery, settings, tmp_path, read_by_words, batch_size=8)
    rows = [len((tmp_path / f"{name}.jsonl").read_text().splitlines()) for name in ("replies", "texts")]
    assert rows == [answers + replies, texts]
    again = of_effects(tiny, circuit, battery, settings, 8, tmp_path)
    assert [part.count for part in again.parts] == [0] * 5 and again.kept == f"up to {sum(rows)} of {sum(rows)} replies and texts are kept"
    more = of_effects(tiny, circuit, battery, replace(settings, rounds=2, followed=1, distances=(0, 40)), 8, tmp_path)
    assert [part.count for part in more.parts[3:]] == [2 * 2 * len(battery.items), 1 * (2 * len(THREE) + 1) * 2]
    assert more.parts[4].tokens == (len(THREE) + 2) * 40
