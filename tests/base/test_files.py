"""Files whole or not at all; JSON lines with the line number in every complaint; a log that survives being killed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import signal
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from emosteer.base import files, jsonl
from emosteer.base.errors import DataError, EmosteerError
from emosteer.base.files import atomic_path, read_jsonl, read_text, sha256_file, sha256_text, write_error, write_jsonl, write_text
from emosteer.base.jsonl import JsonlLog

#: Characters of one to four bytes.
ROWS = [{"id": 1, "text": "naïve"}, {"id": 2, "text": "悲しい 😢"}, {"id": 3, "text": 'a "quote", a {brace} and a \n break'}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def failing(number: int) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def complaint(path: Path, content: bytes) -> str:
    """The one line with which a JSON-lines file is refused."""
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(read_jsonl(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- reading -----------------------------------------------------------------------------------------------------------------


def test_json_lines_come_with_their_line_numbers(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf\n" + LINES.replace(b"\n", b"\r\n\n") + b"   \n")
    assert list(read_jsonl(path)) == [(2, ROWS[0]), (4, ROWS[1]), (6, ROWS[2])]


def test_an_error_on_a_late_line_comes_after_the_rows_before_it(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(LINES + b"oops\n")
    rows = read_jsonl(path)
    assert [next(rows) for _ in range(3)] == [(1, ROWS[0]), (2, ROWS[1]), (3, ROWS[2])]
    with pytest.raises(DataError, match=r"rows\.jsonl:4: "):
        next(rows)


def test_malformed_lines_are_named_by_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert complaint(path, b'{"a": 1}\n\n{"a": }\n') == (
        f"{path}:3: expected a JSON object, found malformed JSON (Expecting value at column 7)"
    )
    assert complaint(path, b'{"a": 1}\n{"a": 1') .startswith(f"{path}:2: expected a JSON object, found malformed JSON (")  # fmt: skip
    assert complaint(path, b'{"a": 1}\n{"b": 2} {"c": 3}\n').startswith(f"{path}:2: ")
    for text, name in ((b"[1]", "list"), (b'"x"', "str"), (b"3", "int"), (b"null", "NoneType")):
        assert complaint(path, b'{"a": 1}\n' + text + b"\n") == f"{path}:2: expected a JSON object, found a {name}"


def test_text_that_is_not_utf8_is_named_by_line_and_byte(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert complaint(path, LINES + '{"text": "café"}\n'.encode("latin-1")) == (
        f"{path}:4: expected UTF-8 text, found byte 0xe9; save it as UTF-8"
    )
    assert complaint(path, '{"a": 1}\n'.encode("utf-16")).startswith(f"{path}:1: expected UTF-8 text, found byte 0xff")


def test_empty_files_are_refused_unless_allowed(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for content in (b"", b"\n \n"):
        assert complaint(path, content) == f"file {path} is empty; expected one JSON object a line"
        assert list(read_jsonl(path, may_be_empty=True)) == []


def test_missing_files_folders_and_unreadable_files_say_what_was_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="reply bank .*nothing does not exist; check the path"):
        read_text(tmp_path / "nothing", "reply bank")
    with pytest.raises(DataError, match="expected a reply bank, found the directory .*name the file inside it"):
        read_text(tmp_path, "reply bank")
    (tmp_path / "x").write_text("x")
    monkeypatch.setattr(Path, "open", failing(errno.EACCES))
    with pytest.raises(DataError, match="cannot read .*x: Permission denied"):
        read_text(tmp_path / "x")


def test_hashes_are_sha256_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes("é".encode())
    assert sha256_file(tmp_path / "x") == sha256_text("é") == hashlib.sha256(b"\xc3\xa9").hexdigest()


# ---- writing whole or not at all -----------------------------------------------------------------------------------------------


def test_a_file_is_written_whole_readable_by_all_and_as_utf8(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "rows.jsonl"
    write_jsonl(path, ROWS)
    assert path.read_bytes() == LINES and stat.S_IMODE(path.stat().st_mode) == 0o644
    write_jsonl(path, [])
    assert path.read_bytes() == b""
    assert list(path.parent.iterdir()) == [path]


def test_nobody_ever_sees_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_text(path, "old")
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old" and temporary.parent == tmp_path  # same file system, so that the rename is atomic
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_an_exception_leaves_what_was_there_and_passes_through(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "x"
    for before in (None, "old"):
        if before:
            path.write_text(before)
        with pytest.raises(error), atomic_path(path) as temporary:
            temporary.write_text("new")
            raise error
        assert [p.read_text() for p in tmp_path.iterdir()] == ([before] if before else [])


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path = tmp_path / "x"
    path.write_text("old")
    monkeypatch.setattr(files.os, step, failing(errno.ENOSPC))
    with pytest.raises(EmosteerError) as caught:
        write_text(path, "new")
    assert str(caught.value) == f"cannot write {path}: the disk is full; free some space and run the command again"
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_the_content_is_on_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    sync, swap = os.fsync, os.replace
    monkeypatch.setattr(files.os, "fsync", lambda handle: (steps.append("sync"), sync(handle))[1])
    monkeypatch.setattr(files.os, "replace", lambda *paths: (steps.append("replace"), swap(*paths))[1])
    write_text(tmp_path / "x", "new")
    assert steps == ["sync", "replace"]


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "the disk is full"),
        (errno.EACCES, "no permission; choose another place"),
        (errno.EROFS, "no permission; choose another place"),
        (errno.ENOTDIR, "a part of its path is a file"),
        (errno.EISDIR, "it is a directory; name a file"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_every_write_error_is_one_line_that_names_the_file(number: int, text: str) -> None:
    message = str(write_error(Path("out") / "x.jsonl", OSError(number, os.strerror(number))))
    assert message.startswith("cannot write out/x.jsonl: ") and text in message and "\n" not in message


# ---- the log that grows --------------------------------------------------------------------------------------------------------


def filled(path: Path) -> JsonlLog:
    log = JsonlLog(path)
    for row in ROWS:
        log.append(row)
    return log


def test_every_row_is_on_disk_before_append_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "log.jsonl"
    synced: list[int] = []
    real = os.fsync
    monkeypatch.setattr(jsonl.os, "fsync", lambda handle: (synced.append(os.fstat(handle).st_size), real(handle))[1])
    log = JsonlLog(path)
    assert log.rows == []
    sizes = []
    for row in ROWS:
        log.append(row)
        sizes.append(path.stat().st_size)
    assert synced == sizes and path.read_bytes() == LINES


def test_a_log_resumes_with_what_it_held(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    filled(path)
    log = JsonlLog(path)
    assert log.rows == ROWS
    log.append({"id": 4})
    assert JsonlLog(path).rows == [*ROWS, {"id": 4}]


def test_a_kill_at_any_byte_loses_at_most_the_row_being_written(tmp_path: Path) -> None:
    """Every prefix, those that split a character of several bytes included."""
    path = tmp_path / "log.jsonl"
    ends = [index + 1 for index, byte in enumerate(LINES) if byte == ord("\n")]
    assert len(ends) == 3
    for length in range(len(LINES) + 1):
        path.write_bytes(LINES[:length])
        log = JsonlLog(path)
        whole = sum(end <= length for end in ends)
        if length + 1 in ends:  # only the line break is missing: the row is whole
            whole += 1
        assert log.rows == ROWS[:whole], length
        assert path.read_bytes() == LINES[: ends[whole - 1] if whole else 0]
        log.append({"after": "é"})
        assert JsonlLog(path).rows == [*ROWS[:whole], {"after": "é"}]


def test_what_a_power_cut_left_empty_at_the_end_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(LINES + b"\0" * 40)
    assert JsonlLog(path).rows == ROWS and path.read_bytes() == LINES


def test_kept_progress_is_one_runs_and_a_killed_one_lets_go(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "p.partial"
    with files.kept_progress(folder):
        (folder / "piece").write_text("1")
        with pytest.raises(EmosteerError, match="p.partial is kept by another run"), files.kept_progress(folder):
            pass
        assert (folder / "piece").read_text() == "1"
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        with files.kept_progress(folder):
            os.write(writing, b"1")
            signal.pause()
    os.read(reading, 1)
    with pytest.raises(EmosteerError, match="another run"), files.kept_progress(folder):
        pass
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with files.kept_progress(folder):
        assert (folder / "piece").exists()
    with files.kept_progress(tmp_path / "empty"):
        pass
    assert not (tmp_path / "empty").exists()


def test_a_folder_of_progress_that_goes_before_it_is_locked_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, opened, times = tmp_path / "p", os.open, iter((True, False))

    def late(path: Path, *rest: int) -> int:
        handle = opened(path, *rest)
        if next(times):
            folder.rmdir()
        return handle

    monkeypatch.setattr(os, "open", late)
    with files.kept_progress(folder):
        assert folder.is_dir()


def test_somebody_else_who_writes_is_noticed_and_nothing_is_mixed(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = filled(path)
    other = JsonlLog(path)
    other.append({"other": 1})
    held = path.read_bytes()
    with pytest.raises(EmosteerError, match="changed by somebody else while it was being written; run one command per file"):
        log.append({"mine": 1})
    assert path.read_bytes() == held
    other.append({"other": 2})
    path.unlink()
    with pytest.raises(EmosteerError, match="changed by somebody else"):
        other.append({"other": 3})
    assert not path.exists()


def test_a_full_disk_leaves_the_rows_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log.jsonl"
    log = filled(path)
    with monkeypatch.context() as patch:
        patch.setattr(jsonl.os, "fsync", failing(errno.ENOSPC))
        with pytest.raises(EmosteerError, match=r"cannot write .*log\.jsonl: the disk is full"):
            log.append({"id": 4})
    assert path.read_bytes() == LINES
    log.append({"id": 5})  # space was freed: it goes on
    assert JsonlLog(path).rows == [*ROWS, {"id": 5}]


def limit_size(size: int) -> Callable[[], None]:
    """Lets no file grow past `size` bytes, as a full disk would: the write stops in the middle. Returns how to lift it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [0, 1, 12, 13])
@pytest.mark.parametrize("mends", [True, False])
def test_a_row_that_only_fits_in_part_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int, mends: bool) -> None:
    """Really written in part. Where it cannot be taken back at once, the next run does."""
    path = tmp_path / "log.jsonl"
    log = filled(path)
    with monkeypatch.context() as patch:
        if not mends:
            patch.setattr(jsonl.os, "truncate", failing(errno.EIO))
        lift = limit_size(len(LINES) + room)
        try:
            with pytest.raises(EmosteerError, match=r"cannot write .*log\.jsonl: File too large"):
                log.append({"text": "éé" * 10})
        finally:
            lift()
    assert path.read_bytes()[: len(LINES)] == LINES
    assert path.stat().st_size == len(LINES) + (0 if mends else room)
    assert JsonlLog(path).rows == ROWS and path.read_bytes() == LINES


OTHERS = {
    "prose": b"Dear diary,\ntoday I\n",
    "prose without an end": b"Dear diary,\ntoday I",
    "a JSON list": b"[1, 2]",
    "indented JSON": b'{\n  "a": 1,\n  "b": {"c": 2}\n}\n',
    "indented JSON without an end": b'{\n  "a": 1,\n  "b": {"c": 2}\n}',
    "a list of rows": b'[\n{"a": 1},\n{"a": 2}\n]',
    "prose and a torn row": b'Dear diary,\n{"a": ',
    "not UTF-8": b'{"a": "caf\xe9"}\n{"a": 1}\n',
    "not UTF-8 and a torn row": b'{"a": "caf\xe9"}\n{"a": ',
    "prose and a row without its line break": b'Dear diary,\n{"a": 1}',
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_file_of_something_else_is_refused_and_stays_as_it_is(tmp_path: Path, name: str) -> None:
    path = tmp_path / "diary"
    path.write_bytes(OTHERS[name])
    with pytest.raises(DataError, match=r"diary:\d+: expected") as caught:
        JsonlLog(path)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == OTHERS[name]


def test_a_torn_row_that_starts_unlike_ours_is_somebody_elses(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    for tail in (b'{"b', b'{"i": 1', b"{ "):
        path.write_bytes(LINES + tail)
        with pytest.raises(DataError, match=r"log\.jsonl:4: expected a JSON object"):
            JsonlLog(path, first_key="id")
        assert path.read_bytes() == LINES + tail
    for tail in (b"{", b'{"i', b'{"id"', b'{"id": 4, "text": "\xe6'):
        path.write_bytes(LINES + tail)
        assert JsonlLog(path, first_key="id").rows == ROWS and path.read_bytes() == LINES


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EmosteerError, match=r"expected --out to name a file, found"):
        JsonlLog(tmp_path)
    (tmp_path / "file").write_text("{}")
    with pytest.raises(EmosteerError, match="a part of its path is a file, not a directory"):
        JsonlLog(tmp_path / "file" / "log.jsonl")
    monkeypatch.setattr(Path, "open", failing(errno.EACCES))
    with pytest.raises(EmosteerError, match="no permission; choose another place with --out"):
        JsonlLog(tmp_path / "log.jsonl")


def test_a_log_that_stayed_empty_is_removed_and_no_other(tmp_path: Path) -> None:
    JsonlLog(tmp_path / "new").close()
    assert not (tmp_path / "new").exists()
    (tmp_path / "was there").touch()
    JsonlLog(tmp_path / "was there").close()
    log = filled(tmp_path / "full")
    log.close()
    mine, other = JsonlLog(tmp_path / "shared"), JsonlLog(tmp_path / "shared")
    other.append({"paid": "for"})
    mine.close()
    assert JsonlLog(tmp_path / "shared").rows == [{"paid": "for"}], "of another command that keeps to the same file"
    (tmp_path / "shared").unlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "was there"] and (tmp_path / "full").read_bytes() == LINES
