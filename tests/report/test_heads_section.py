"""The report's section on heads, from an artefact with invented values; in a real browser where there is one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from emosteer.circuits.places import Places
from emosteer.report.inputs import read_inputs
from emosteer.report.page import build_report
from emosteer.report.sections import sections
from emosteer.scenarios.scenarios import EMOTIONS
from tests.helpers.browser import BROWSER, launched
from tests.helpers.heads_setup import OWN, SUPPRESSED, head_study
from tests.helpers.report_setup import HEADS, LAYERS, MODEL, provenance

HOSTILE = "</script><script>window.hacked = 1</script>{{ 7 * 7 }}"


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    """A folder with nothing but a study of heads."""
    made = Places.of(MODEL, tmp_path_factory.mktemp("artefacts"))
    origin = provenance("heads of a circuit", parents={"circuit": "d" * 64})
    head_study(replace(origin, command="emosteer heads"), EMOTIONS, LAYERS, HEADS, described=3, text=HOSTILE).save(made.heads)
    return made


def test_the_section_says_what_was_read_and_lists_every_head(places: Places) -> None:
    inputs = read_inputs(places)
    section = next(section for section in sections(inputs) if section.id == "head-pages")
    overview, looking = section.tables
    assert "12 prompts" in section.intro and any("correlation 0.91" in note and "0.83" in note for note in section.notes)
    assert [row[0] for row in overview.rows] == [emotion.capitalize() for emotion in EMOTIONS]
    assert overview.rows[0][1:5] == ["75\u202f%", overview.rows[0][2], "0.30", "+0.50"]
    assert [row[0] for row in looking.rows][-2:] == ["All heads of the model", "If all tokens were alike"]
    (listed,) = section.after
    assert len(listed.rows) == 18 and listed.rows[0][5] == "anger (name), slam" and listed.rows[0][6] == OWN
    assert [row[0] for row in listed.rows[:3]] == ["L0H0", "L1H1", "L2H2"]


def test_a_page_without_heads_says_nothing_of_them(places: Places) -> None:
    assert all(section.id != "head-pages" for section in sections(replace(read_inputs(places), heads=None)))


def test_a_head_s_page_is_no_live_region(places: Places, tmp_path: Path) -> None:
    """All of it would be read out at each choice."""
    text = build_report(places, tmp_path / "report.html").path.read_text("utf-8")
    (article,) = re.findall(r'<article id="head-page"[^>]*>', text)
    assert "aria-live" not in article


def test_heads_of_another_circuit_are_warned_of(places: Places, tmp_path: Path) -> None:
    from tests.helpers.report_setup import directions

    other = Places.of(MODEL, tmp_path)
    origin = provenance("heads", parents={"directions": "e" * 64})
    head_study(origin, EMOTIONS, LAYERS, HEADS).save(other.heads)
    directions().save(other.directions)
    assert any("told from another directions" in warning for warning in read_inputs(other).warnings)


# ---- in a browser ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    if BROWSER is None:
        pytest.skip("no Chromium is on the PATH")
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed; it comes with emosteer[dev]")
    with launched() as browser:
        yield browser


@pytest.fixture
def page(chromium: Any, places: Places, tmp_path: Path) -> Iterator[Any]:
    """The page, on a phone; fails at the end if it reported an error or asked for anything."""
    problems: list[str] = []
    address = build_report(places, tmp_path / "report.html").path.as_uri()
    found = chromium.new_page(viewport={"width": 390, "height": 800}, reduced_motion="reduce")
    found.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
    found.on("pageerror", lambda error: problems.append(str(error)))
    found.on("request", lambda request: None if request.url.startswith((address, "data:")) else problems.append(request.url))
    found.goto(address)
    yield found
    found.close()
    assert not problems


def test_heads_can_be_clicked_and_show_their_page(page: Any) -> None:
    assert page.locator("#head-drawing .node.described").count() == 3 and page.locator("#head-drawing .edge").count() == 3
    assert (
        page.locator("#head-page h3").inner_text().startswith("L0H0") and page.locator(".node.chosen").get_attribute("data-head") == "L0H0"
    )
    page.locator('.node[data-head="L1H1"]').click()
    assert page.locator("#head-page h3").inner_text().startswith("L1H1") and "number 2" in page.inner_text("#head-page h3")
    assert {line.get_attribute("data-to") for line in page.locator(".edge.mine").all()} == {"L1H1", "L2H2"}
    assert "slam" in page.inner_text("#head-page") and SUPPRESSED in page.inner_text("#head-page")
    assert "anger" in page.locator("#head-page .named").first.inner_text(), "the emotion's name is marked"
    page.locator("#head-page .jump").first.click()
    assert page.locator("#head-page h3").inner_text().startswith(("L0H1", "L2H2"))
    assert page.evaluate("document.activeElement === document.querySelector('#head-page h3')"), "the button that was pressed is gone"


def test_emotions_take_turns_and_the_keyboard_reaches_heads(page: Any) -> None:
    page.get_by_role("button", name="fear", exact=True).click()
    assert "fear" in page.inner_text("#head-page h3") and page.locator('#head-emotions [aria-pressed="true"]').inner_text() == "fear"
    node = page.locator("#head-drawing .node").nth(1)
    node.focus()
    page.keyboard.press("Enter")
    assert page.locator("#head-page h3").inner_text().startswith(node.get_attribute("data-head"))


def test_texts_are_shaded_and_do_nothing(page: Any) -> None:
    shown = page.locator("#head-page .shaded").first
    assert HOSTILE in shown.inner_text() and page.evaluate("window.hacked") is None and page.locator("#head-page script").count() == 0
    colours = [span.evaluate("node => getComputedStyle(node).backgroundColor") for span in shown.locator("span").all()]
    assert len(set(colours)) >= 3 and colours[-1] == "rgba(0, 0, 0, 0)", "the last token has written nothing"
    assert page.evaluate("document.documentElement.scrollWidth") <= 390, "the page scrolls sideways"
