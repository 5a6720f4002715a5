"""Whose a file is: what others own or may write to is named, what is the user's alone is not."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from emosteer.base import cache_folder, ownership
from emosteer.base.cache_folder import make_folder, remembered_sha256, require_trusted, silent
from emosteer.base.errors import ModelError
from emosteer.base.files import sha256_file
from emosteer.base.ownership import stranger

pytestmark = pytest.mark.skipif(not hasattr(os, "getuid"), reason="this system has no owners and modes")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = make_folder(tmp_path / "cache" / "native") / "step.so"
    path.write_text("x")
    path.chmod(0o644)
    return path


def test_what_is_the_user_s_alone_is_trusted_also_before_it_is_there(file: Path) -> None:
    assert stranger(file) is None and stranger(file.with_name("not yet")) is None


@pytest.mark.parametrize("mode", [0o666, 0o646])
def test_a_file_that_others_may_write_to_is_named(file: Path, mode: int) -> None:
    file.chmod(mode)
    assert stranger(file) == f"{file} can be written by others (mode {mode:o})"


def test_so_is_a_folder_anywhere_above_it_unless_only_owners_may_exchange_what_lies_in_it(file: Path) -> None:
    above = file.parents[1]
    above.chmod(0o777)
    assert stranger(file) == f"{above} can be written by others (mode 777)"
    above.chmod(0o1777)
    assert stranger(file) is None, "as /tmp"


def test_a_group_of_the_user_s_own_is_no_stranger_and_any_other_is(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.chmod(0o664)
    for private, named in ((True, None), (False, f"{file} can be written by others (mode 664)")):
        monkeypatch.setattr(ownership, "_private", lambda group, private=private: private)
        assert stranger(file) == named


def test_what_belongs_to_another_user_is_named_unless_the_user_is_trusted(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = file.stat().st_uid
    monkeypatch.setattr(os, "getuid", lambda: mine + 4321)
    if mine == 0:  # tests run as root, who is trusted by everybody: the file is handed to somebody
        os.chown(file, 1234, -1)
        assert stranger(file) == f"{file} belongs to user 1234" and stranger(file, 1234) is None
    else:
        assert stranger(file) == f"{file} belongs to user {mine}" and stranger(file, mine) is None


def test_a_link_is_judged_by_where_it_leads_and_by_where_it_lies(file: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(file)
    assert stranger(link) is None
    file.parent.chmod(0o777)
    assert stranger(link) == f"{file.parent} can be written by others (mode 777)"


def test_folders_of_the_cache_are_closed_to_others_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o000)
    try:
        made = make_folder(tmp_path / "a" / "b" / "c")
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in (made, made.parent, made.parents[1])] == [0o755] * 3


def test_remembered_hashes_are_believed_only_where_nobody_else_can_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they say decides which weights are trusted."""
    monkeypatch.setattr(cache_folder, "cache_dir", lambda: tmp_path / "cache")
    file = tmp_path / "weights"
    file.write_text("real")
    assert remembered_sha256(file, silent) == sha256_file(file)
    memory = tmp_path / "cache" / "hashes.json"
    (size, time, _) = json.loads(memory.read_text())[str(file)]
    memory.write_text(json.dumps({str(file): [size, time, "f" * 64]}))
    assert remembered_sha256(file, silent) == "f" * 64, "a remembered hash saves the reading"
    memory.chmod(0o666)
    assert remembered_sha256(file, silent) == sha256_file(file)
    planted = tmp_path / "planted"
    planted.write_text("theirs")
    stat = planted.stat()
    memory.write_text(json.dumps({str(planted): [stat.st_size, stat.st_mtime_ns, "e" * 64]}))
    memory.chmod(0o666)
    remembered_sha256(file, silent)  # writes the memory anew
    memory.chmod(0o600)
    assert remembered_sha256(planted, silent) == sha256_file(planted), "what was not believed is not handed on"


def test_weights_in_a_cache_that_others_can_write_to_are_refused_in_one_line(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMOSTEER_CACHE", str(file.parents[1]))
    require_trusted(file)
    file.parent.chmod(0o777)
    with pytest.raises(ModelError, match="the cache cannot be trusted: .*native can be written by others .mode 777.*EMOSTEER_CACHE"):
        require_trusted(file)
