"""Errors that reach the user as one line: what was expected, what was found, what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EmosteerError(Exception):
    """Any failure that the user can act on. Shown as one line; `--debug` shows the traceback."""

    exit_code = 1


class UsageError(EmosteerError):
    """The command line or an argument is wrong (exit code 2)."""

    exit_code = 2


class DataError(EmosteerError):
    """A dataset or reply file is missing, malformed or inconsistent."""


class ModelError(EmosteerError):
    """A model cannot be found, loaded or trusted."""


class ArtifactError(EmosteerError):
    """An artefact is missing, damaged, of another kind or made for another model."""


class DegenerateDirection(EmosteerError):
    """A direction has no length: the data does not tell this emotion from the others."""


class OutOfMemory(EmosteerError):
    """Not even a batch of one fits in memory."""


#: How torch and the C library say that memory ran out.
_NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")


def says_out_of_memory(error: BaseException) -> bool:
    """Whether an exception's type or text means that memory ran out (host or GPU)."""
    return isinstance(error, MemoryError) or any(text in str(error).lower() for text in _NO_MEMORY)


def suggest(word: str, known: Iterable[str]) -> str:
    """Returns " (did you mean 'x'?)" for the known word nearest to `word`, or an empty string."""
    near = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.5)
    return f" (did you mean '{near[0]}'?)" if near else ""


def first_line(error: BaseException) -> str:
    """What a foreign error says, short enough for a message of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
