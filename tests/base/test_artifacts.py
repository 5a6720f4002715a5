"""Artefacts come back bit for bit or are refused in one line."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pickle
import resource
import struct
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from emosteer.base import artifacts, files
from emosteer.base.artifacts import SCHEMA_VERSION, Provenance, load, require_model, save
from emosteer.base.errors import ArtifactError, EmosteerError

SOURCE = Provenance(
    model="tiny/llama",
    model_sha256="a1" * 32,
    template_sha256="b2" * 32,
    method="difference of means",
    params={"holdout": 0.1, "emotions": ["anger", "Freude"], "nested": {"x": None}},
    seed=7,
    data={"train.jsonl": "c3" * 32},
    parents={"scores": "d4" * 32},
    versions={"torch": "2"},
    command="emosteer extract --seed 7",
)
FIELDS: dict[str, Any] = {"emotions": ["anger", "été", "喜び"], "n_groups": 12, "share": 0.1 + 0.2, "none": None, "yes": True}


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "z.mean": torch.randn(3, 4),
        "double": torch.randn(5, dtype=torch.float64),
        "half": torch.randn(4).bfloat16(),
        "whole": torch.arange(6).reshape(2, 3),
        "flags": torch.tensor([True, False]),
        "edge": torch.tensor([0.0, -0.0, 1e-45, torch.finfo(torch.float32).max]),
        "view": torch.randn(6, 6).T[1:4],
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
    }


def one_line(path: Path, match: str, kind: str | None = None) -> str:
    """The message with which a file is refused."""
    with pytest.raises(ArtifactError, match=match) as caught:
        load(path, kind)
    text = str(caught.value)
    assert "\n" not in text and str(path) in text
    return text


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.safetensors"
    save(path, "directions", FIELDS, tensors(), SOURCE)
    return path


# ---- round trip ---------------------------------------------------------------------------------------------------------------


def test_everything_comes_back_bit_for_bit(good: Path) -> None:
    found = load(good, "directions")
    assert (found.kind, found.fields, found.provenance, found.path) == ("directions", FIELDS, SOURCE, good)
    assert found.sha256 == files.sha256_file(good)
    assert found.tensors.keys() == tensors().keys()
    for name, value in tensors().items():
        again = found.tensors[name]
        assert again.dtype == value.dtype and again.shape == value.shape, name
        assert again.contiguous().view(-1).view(torch.uint8).tolist() == value.contiguous().view(-1).view(torch.uint8).tolist(), name
    assert load(good).kind == "directions"  # any kind will do where none is asked for


def test_the_same_content_gives_the_same_bytes(good: Path, tmp_path: Path) -> None:
    shuffled = dict(reversed(tensors().items()))
    save(tmp_path / "b", "directions", dict(reversed(FIELDS.items())), shuffled, SOURCE)
    assert (tmp_path / "b").read_bytes() == good.read_bytes()
    found = load(good)
    save(tmp_path / "c", found.kind, found.fields, found.tensors, found.provenance)
    assert (tmp_path / "c").read_bytes() == good.read_bytes()
    one_bit = tensors() | {"scalar": torch.nextafter(torch.tensor(2.5), torch.tensor(3.0))}
    for fields, values, source in ((FIELDS, one_bit, SOURCE), (FIELDS | {"yes": False}, tensors(), SOURCE), (FIELDS, tensors(), None)):
        save(tmp_path / "d", "directions", fields, values, source or replace(SOURCE, seed=8))
        assert (tmp_path / "d").read_bytes() != good.read_bytes()


def test_a_file_is_plain_safetensors_with_a_json_header(good: Path) -> None:
    """Read without the module: eight bytes of length, JSON, then numbers."""
    data = good.read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    own = json.loads(header["__metadata__"]["emosteer"])
    assert own == {"schema": "emosteer/directions", "schema_version": 1, "fields": FIELDS, "provenance": asdict(SOURCE)}
    assert load(good).provenance == SOURCE
    start, end = (8 + struct.unpack("<Q", data[:8])[0] + offset for offset in header["double"]["data_offsets"])
    assert struct.unpack("<5d", data[start:end]) == tuple(tensors()["double"].tolist())


def test_tensors_with_gradients_are_saved_and_missing_folders_made(tmp_path: Path) -> None:
    weight = torch.ones(2, requires_grad=True)
    save(tmp_path / "a" / "b" / "c.safetensors", "scores", {}, {"x": weight * 2}, SOURCE)
    assert load(tmp_path / "a" / "b" / "c.safetensors").tensors["x"].tolist() == [2.0, 2.0]


def test_versions_name_what_computes() -> None:
    found = artifacts.versions()
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert set(found) == {"emosteer", "python", "torch", "transformers", "transformer-lens", "safetensors"}


# ---- refused -----------------------------------------------------------------------------------------------------------------


def test_missing_files_and_folders(tmp_path: Path) -> None:
    one_line(tmp_path / "nothing", "does not exist; check the path")
    one_line(tmp_path, "it is a directory")


class Bomb:
    """Unpickled, it would leave a mark."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, ...]]:
        return os.mkdir, ("was-unpickled",)


def test_pickles_are_named_as_such_and_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "directions.pt"
    for zipped in (True, False):
        torch.save({"dirs": torch.ones(3), "bomb": Bomb()}, path, _use_new_zipfile_serialization=zipped)
        one_line(path, "is a pickle .*only safetensors, because a pickle can run code")
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps(Bomb(), protocol=protocol))
        one_line(path, "is a pickle")
    for protocol in (0, 1):  # no magic of their own
        path.write_bytes(pickle.dumps(Bomb(), protocol=protocol))
        one_line(path, "damaged or not a safetensors file")
    assert not (tmp_path / "was-unpickled").exists()


def test_a_file_cut_off_anywhere_is_refused(good: Path, tmp_path: Path) -> None:
    data, cut = good.read_bytes(), tmp_path / "cut"
    header = 8 + struct.unpack("<Q", data[:8])[0]
    for length in {0, 1, 2, 7, 8, 9, header // 2, header - 1, header, header + 1, (header + len(data)) // 2, len(data) - 1}:
        cut.write_bytes(data[:length])
        one_line(cut, r"damaged or not a safetensors file .*make it again")
    cut.write_bytes(data + b"\0")
    one_line(cut, "damaged")


def test_random_bytes_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(3)
    for size in (8, 100, 5000):
        path = tmp_path / str(size)
        path.write_bytes(bytes(torch.randint(0, 256, (size,)).tolist()))
        one_line(path, "damaged or not a safetensors file")


def test_somebody_elses_safetensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for metadata in (None, {"format": "pt"}):
        save_file({"weight": torch.ones(2)}, path, metadata=metadata)
        one_line(path, "not an emosteer artefact: it has no 'emosteer' header")


def test_the_wrong_kind_and_the_wrong_version_name_both(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one_line(good, r"expected an artefact of kind 'scores', found 'directions'", "scores")
    monkeypatch.setattr(artifacts, "SCHEMA_VERSION", SCHEMA_VERSION + 1)
    one_line(good, rf"schema version {SCHEMA_VERSION}, this emosteer reads version {SCHEMA_VERSION + 1}; make it again")


GOOD_HEADER = {"schema": "emosteer/directions", "schema_version": SCHEMA_VERSION, "fields": {}, "provenance": asdict(SOURCE)}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        '"text"',
        "3",
        "{}",
        *(json.dumps({k: v for k, v in GOOD_HEADER.items() if k != missing}) for missing in GOOD_HEADER),
        json.dumps(GOOD_HEADER | {"provenance": {"model": "x"}}),
        json.dumps(GOOD_HEADER | {"provenance": []}),
        json.dumps(GOOD_HEADER | {"provenance": asdict(SOURCE) | {"surplus": 1}}),
        json.dumps(GOOD_HEADER | {"fields": ["not", "an", "object"]}),
    ],
)
def test_a_malformed_header_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.safetensors"
    save_file({"x": torch.ones(1)}, path, metadata={"emosteer": text})
    one_line(path, "malformed emosteer header .*make it again")


def test_the_header_of_these_tests_is_otherwise_good(tmp_path: Path) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "ok", metadata={"emosteer": json.dumps(GOOD_HEADER)})
    assert load(tmp_path / "ok", "directions").provenance == SOURCE


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_values_that_are_not_finite_are_refused_by_name(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    bad = torch.zeros(3, 3, dtype=dtype)
    bad[1, 2] = value
    save(tmp_path / "bad", "scores", {}, {"fine": torch.ones(2), "heads": bad}, SOURCE)
    one_line(tmp_path / "bad", "not finite in 'heads'")


def test_another_models_artefact_is_refused_with_both_names(good: Path) -> None:
    require_model(SOURCE, "a1" * 32, "renamed since", good)  # the weights decide, not the name
    with pytest.raises(ArtifactError) as caught:
        require_model(SOURCE, "ff" * 32, "tiny/qwen", good)
    text = str(caught.value)
    for part in (str(good), "tiny/llama", "a1a1a1a1a1a1", "tiny/qwen", "ffffffffffff", "emosteer extract --model"):
        assert part in text
    assert "\n" not in text


def test_an_unreadable_file_is_one_line(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    one_line(good, "cannot read .*Permission denied")


# ---- writing -----------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def unchanged(path: Path, match: str | None, error: type[BaseException] = EmosteerError) -> Iterator[None]:
    """What runs inside fails with one line, the file stays as it was, and no scraps are left beside it."""
    before, beside = path.read_bytes(), sorted(path.parent.iterdir())
    with pytest.raises(error, match=match) as caught:
        yield
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before and sorted(path.parent.iterdir()) == beside


def failing(number: int, text: str) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, text)

    return fail


def test_a_full_disk_leaves_the_old_file(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer's Rust side says it in words. (Never point it at /dev/full: it renames a file into place, over the device.)"""

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(artifacts, "save_file", full)
    with unchanged(good, r"cannot write .*good\.safetensors: the disk is full; free some space"):
        save(good, "directions", {}, {"x": torch.ones(100_000)}, SOURCE)


def test_a_write_that_stops_in_the_middle_leaves_the_old_file(good: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with unchanged(good, r"cannot write .*good\.safetensors"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            save(good, "directions", {}, {"x": torch.ones(100_000)}, SOURCE)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("step", ["fsync", "replace", "chmod"])
def test_a_failure_at_any_step_leaves_the_old_file(good: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    monkeypatch.setattr(files.os, step, failing(errno.ENOSPC, "No space left on device"))
    with unchanged(good, "the disk is full"):
        save(good, "directions", {}, {"x": torch.ones(2)}, SOURCE)


def test_an_interruption_leaves_the_old_file(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def torn(_: object, path: Path, **__: object) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(artifacts, "save_file", torn)
    with unchanged(good, None, KeyboardInterrupt):
        save(good, "directions", {}, {"x": torch.ones(2)}, SOURCE)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_folder_that_cannot_be_written_is_one_line(good: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(files.tempfile, "mkstemp", failing(number, os.strerror(number)))
    with unchanged(good, r"good\.safetensors: no permission; choose another place with --out"):
        save(good, "directions", {}, {"x": torch.ones(2)}, SOURCE)


def test_paths_that_cannot_be_files_are_one_line(good: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with unchanged(good, "it is a directory; name a file"):
        save(tmp_path / "folder", "directions", {}, {"x": torch.ones(2)}, SOURCE)
    with unchanged(good, "a part of its path is a file, not a directory"):
        save(good / "below.safetensors", "directions", {}, {"x": torch.ones(2)}, SOURCE)
