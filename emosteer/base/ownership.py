"""Who else could change a file: asked before a program or weights from the cache are trusted. No torch here."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def stranger(path: Path, trusted: int | None = None) -> str | None:
    """Why a path is not the user's alone: another user owns it or may write to it, or to a folder above it; None where nobody can.

    Root is trusted, and so is a group of the user's own. Of a path that is not there yet the folders are asked. Systems without owners
    and modes (Windows) are not asked.

    Args:
        trusted: one more user id, of somebody whom the user chose to trust.
    """
    if not hasattr(os, "getuid"):
        return None
    owners = {0, os.getuid(), trusted}
    for place in _chain(path):
        try:
            found = place.lstat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            return f"{place} cannot be examined ({error.strerror})"
        if found.st_uid not in owners:
            return f"{place} belongs to user {found.st_uid}"
        sticky = stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX  # as /tmp: nobody can exchange what others own
        if stat.S_ISLNK(found.st_mode) or sticky:
            continue
        if found.st_mode & stat.S_IWOTH or (found.st_mode & stat.S_IWGRP and not _private(found.st_gid)):
            return f"{place} can be written by others (mode {stat.S_IMODE(found.st_mode):o})"
    return None


def _chain(path: Path) -> list[Path]:
    """The path and every folder above it, as written and as links resolve."""
    places = [Path(os.path.abspath(path)), Path(os.path.realpath(path))]
    return list(dict.fromkeys(step for place in places for step in (place, *place.parents)))


def _private(group: int) -> bool:
    """Whether a group is the user's own and has nobody else in it, as many systems make one for every user."""
    import grp
    import pwd

    try:
        me = pwd.getpwuid(os.getuid()).pw_name
        found = grp.getgrgid(group)
    except KeyError:
        return False
    return found.gr_name == me and set(found.gr_mem) <= {me}
