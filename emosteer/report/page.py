"""Sections and template -> the page: one file, styles, script and plots inside, nothing loaded from anywhere."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from emosteer import __version__
from emosteer.base.errors import ArtifactError, EmosteerError, first_line
from emosteer.base.files import write_text
from emosteer.circuits.places import Places
from emosteer.report.disputes import disputes
from emosteer.report.figures import Absent, CellValue, FigureTable
from emosteer.report.head_pages import data as head_data
from emosteer.report.inputs import Inputs, read_inputs
from emosteer.report.replies import Browser, browser, clean
from emosteer.report.sections import sections
from emosteer.report.verdict import verdict
from emosteer.report.wording import THIN

#: The page stays below this, and replies below their share of it.
MAX_BYTES, REPLY_BYTES = 4_900_000, 2_500_000
_HERE = Path(__file__).parent
#: What the page runs, in this order; each does nothing where its part of the page is not there.
_SCRIPTS = ("filters.js", "heads.js")


@dataclass(frozen=True)
class Built:
    """A written page. missing: what is not on it, and why where it was not merely not found; replies, replies_total: embedded
    and in the artefact."""

    path: Path
    size: int
    missing: Sequence[str]
    warnings: Sequence[str]
    replies: int
    replies_total: int


def build_report(places: Places, out: Path, model: str | None = None) -> Built:
    """Writes the page from whatever artefacts there are; what is missing is named on it. The same artefacts give the same bytes.

    Args:
        model: what the user called the model; commands on the page use it.

    Raises:
        ArtifactError: if an artefact is damaged or there is none. EmosteerError: if the page cannot be written.
    """
    inputs = read_inputs(places, model)
    text, shown = drawn(inputs, places.folder)
    write_text(out, text)
    missing = [item.what if item.why == Absent.why else f"{item.what} ({item.why})" for item in inputs.absent]
    return Built(out, len(text.encode()), missing, inputs.warnings, shown.shown, shown.total)


def drawn(inputs: Inputs, folder: Path) -> tuple[str, Browser]:
    """The page's text, or a refusal of what cannot be drawn: an evaluation has more parts than its reader checks.

    Raises:
        ArtifactError: if a part is not what it must be. EmosteerError: as for `render`.
    """
    try:
        return render(inputs)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise ArtifactError(
            f"the report cannot be drawn: a part of what lies in {folder} is malformed ({type(error).__name__}: {first_line(error)}); "
            "--debug shows where, then make that artefact again"
        ) from error


def render(inputs: Inputs) -> tuple[str, Browser]:
    """The page's text, with as many replies as fit.

    Raises:
        EmosteerError: if even without replies it is too large.
    """
    fixed: dict[str, Any] = {
        "sections": sections(inputs),
        "verdict": verdict(inputs.contest, inputs.circuit, inputs.check, inputs.model),
        "inputs": inputs,
        "disputes": disputes(inputs.replies),
        "heads": head_data(inputs.heads) if inputs.heads is not None else None,
        "version": __version__,
    }
    templates = environment()
    bare = len(_page(templates, fixed, browser([], inputs.emotions, 0)).encode())
    budget = min(REPLY_BYTES, MAX_BYTES - bare)
    if budget <= 0:
        raise EmosteerError(
            f"expected a page below {MAX_BYTES:,} bytes, found {bare:,} without any reply; the model has too many units to draw"
        )
    while True:
        shown = browser(inputs.replies, inputs.emotions, budget)
        text = _page(templates, fixed, shown)
        if len(text.encode()) <= MAX_BYTES or not shown.shown:
            return text, shown
        budget = int(budget * 0.9)  # escaping made the text longer than it was counted


def commands(text: str) -> Markup:
    """A line of prose in which what stands between backticks is set as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def environment() -> jinja2.Environment:
    """What templates of this folder are read with."""
    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    found.policies["json.dumps_function"] = _json
    found.filters |= {"numeric": numeric, "cell": cell, "svg": Markup, "commands": commands, "thousands": lambda n: f"{n:,}"}
    return found


def _page(templates: jinja2.Environment, fixed: Mapping[str, Any], shown: Browser) -> str:
    style, script = stylesheet(), "\n".join((_HERE / name).read_text(encoding="utf-8") for name in _SCRIPTS)
    return clean(
        templates.get_template("template.html").render(
            **fixed, browser=shown, style=Markup(style), script=Markup(script), **digests(style=style, script=script)
        )
    )


def stylesheet() -> str:
    """The style of every page."""
    return (_HERE / "style.css").read_text(encoding="utf-8")


def digests(**texts: str) -> dict[str, Markup]:
    """What the page's policy lets through, each by the hash of its text: a style or a script that came with a name or a reply has none."""
    hashes = {name: hashlib.sha256(text.encode()).digest() for name, text in texts.items()}
    return {f"{name}_sha256": Markup(base64.b64encode(digest).decode()) for name, digest in hashes.items()}


def _json(value: Any, **_: Any) -> str:
    """Compact JSON in the order given; jinja's `tojson` then escapes <, >, & and '."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


_NUMBER = re.compile(r"^[+\u2212<]?\s?[\d.,]|^\u2013?$")


def numeric(table: FigureTable) -> list[bool]:
    """Which columns hold numbers, and are therefore aligned at the right."""
    return [all(_NUMBER.match(cell(row[i])) for row in table.rows) if i else False for i in range(len(table.head))]


def cell(value: CellValue) -> str:
    """A table cell's text."""
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}" if isinstance(value, float) else value.replace(" %", f"{THIN}%")
