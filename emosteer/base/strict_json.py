"""JSON that means one thing: read with every doubt refused. No torch here.

Python's own reader takes the last of two equal keys, reads NaN, Infinity and 1e400 as numbers, and gives up on deep nesting with a
RecursionError. Whatever is read from a file here goes through `loads` instead.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

#: Digits that an integer may have; more than any count, size or seed needs, and few enough to be a finite float.
MAX_DIGITS = 300


#: What would steer a terminal, and halves of characters: no text that is kept in an artefact holds any.
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


class Malformed(ValueError):
    """A text that is not JSON, or not JSON that means one thing. The message says what was found, without file or line."""


def loads(text: str | bytes) -> Any:
    """Reads one JSON value.

    Raises:
        Malformed: for anything that is not JSON, a key given twice, a number that is not finite or has too many digits, and nesting
            deeper than Python reads (about a thousand levels).
    """
    try:
        return json.loads(text, object_pairs_hook=_object, parse_int=_integer, parse_float=_number, parse_constant=_constant)
    except json.JSONDecodeError as error:
        raise Malformed(f"{error.msg} at column {error.colno}") from error
    except UnicodeDecodeError as error:
        raise Malformed(f"byte 0x{error.object[error.start]:02x}, which is not UTF-8") from error
    except RecursionError:
        raise Malformed("objects or lists nested too deep") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise Malformed(f"the key {json.dumps(twice, ensure_ascii=False)[:40]} twice in one object")
    return made


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise Malformed(f"a number of {len(digits)} digits, expected at most {MAX_DIGITS}")
    return int(digits)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise Malformed(f"the number {text[:20]}, which is too large")
    return value


def _constant(name: str) -> Any:
    raise Malformed(f"{name}, which is no JSON number")
