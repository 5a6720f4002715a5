"""The report in a real headless Chromium: no errors, nothing loaded, every plot visible, filters, phone and desktop, light and dark, print.

Needs a Chromium on the PATH (`tests/helpers/browser.py` has the names) and playwright; skipped with the reason where either is
missing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from emosteer.scenarios.scenarios import EMOTIONS
from tests.helpers.browser import launched, require_browser
from tests.helpers.report_setup import HOSTILE_THEME, JUDGES, TRUTH, whole_page

playwright = require_browser("the report")

VARIANTS = [(width, scheme) for width in (1280, 390) for scheme in ("light", "dark")]
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """One browser for all tests."""
    with launched() as browser:
        yield browser


@pytest.fixture
def visit(chromium: Any) -> Iterator[Open]:
    """Opens the page of everything; fails at the end if the page reported an error or asked for anything but itself."""
    problems: list[str] = []
    contexts = []

    def open_page(width: int = 1280, scheme: str = "light", **options: Any) -> Any:
        context = chromium.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, reduced_motion="reduce", **options)
        contexts.append(context)
        page = context.new_page()
        address = whole_page()[1].path.as_uri()
        page.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on(
            "request", lambda request: None if request.url.startswith((address, "data:")) else problems.append(f"asked for {request.url}")
        )
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not problems


def unfold(page: Any) -> None:
    """Opens every fold."""
    page.evaluate("document.querySelectorAll('details').forEach((fold) => { fold.open = true; })")


@pytest.mark.parametrize(("width", "scheme"), VARIANTS)
def test_opens_without_errors_and_every_plot_is_visible(visit: Open, width: int, scheme: str) -> None:
    page = visit(width, scheme)
    unfold(page)
    shapes = page.evaluate(
        """() => [...document.querySelectorAll('figure')].map((figure) => ({
            name: figure.id,
            plots: [...figure.querySelectorAll('.plot')].filter((plot) => plot.checkVisibility()).map((plot) => {
                const box = plot.getBoundingClientRect();
                return [box.width, box.height, plot.querySelectorAll('path, line, rect, circle, text').length];
            }),
            hidden: [...figure.querySelectorAll('.plot')].filter((plot) => !plot.checkVisibility()).length,
        }))"""
    )
    assert len(shapes) == 21
    for found in shapes:
        assert found["plots"] and all(w > 200 and h > 60 and marks > 10 for w, h, marks in found["plots"]), found["name"]
        twice = found["name"] in ("fig-frontier", "fig-map", "fig-naming", "fig-holding")
        assert found["hidden"] == int(twice), "one drawing of two is shown where there are two, else all"
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
    wide = page.evaluate(
        """() => [...document.querySelectorAll('body *')].filter((node) => {
            const box = node.getBoundingClientRect();
            return box.width && box.right > innerWidth + 1 && !node.closest('.scroll, .skip') && !node.closest('svg');
        }).map((node) => node.outerHTML.slice(0, 80))"""
    )
    assert not wide, "these stick out"


def test_plots_and_page_change_with_the_scheme_and_stay_readable(visit: Open) -> None:
    """Contrast by the formula of WCAG 2: text at least 4.5, lines and marks at least 3."""
    script = """() => {
        const rgb = (value) => {
            const probe = document.createElement('i');
            probe.style.color = value;
            document.body.append(probe);
            const found = getComputedStyle(probe).color.match(/[\\d.]+/g).slice(0, 3).map(Number);
            probe.remove();
            return found;
        };
        const style = getComputedStyle(document.documentElement);
        const names = ['paper', 'ink', 'muted', 'link', 'good', 'mixed', 'bad', 'm-circuit', 'm-residual', 'm-learned', 'm-tone',
            'm-system', 'm-stimulus', 'm-none', 'm-control', 'series-1', 'series-2', 'series-3', 'series-4', 'series-5'];
        const mark = document.querySelector('#fig-frontier .wide path[fill="var(--m-circuit)"]');
        return { colours: Object.fromEntries(names.map((name) => [name, rgb(style.getPropertyValue('--' + name))])),
            mark: getComputedStyle(mark).fill, body: getComputedStyle(document.body).backgroundColor };
    }"""
    seen = {scheme: visit(1280, scheme).evaluate(script) for scheme in ("light", "dark")}
    assert seen["light"]["body"] != seen["dark"]["body"]
    for found in seen.values():
        colours = found["colours"]
        assert found["mark"] == "rgb({}, {}, {})".format(*colours["m-circuit"]), "the plot's colour is not the page's variable"
        for name in ("ink", "muted", "link", "good", "mixed", "bad"):
            assert contrast(colours[name], colours["paper"]) >= 4.5, name
        for name in colours:
            if name.startswith(("m-", "series-")):
                assert contrast(colours[name], colours["paper"]) >= 3, name


def contrast(a: list[float], b: list[float]) -> float:
    """Contrast ratio of two sRGB colours."""

    def luminance(colour: list[float]) -> float:
        linear = [(c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4) for c in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def found(page: Any) -> int:
    """How many requests fit the filters, as the page says."""
    return int(re.match(r"[\d,]+", page.inner_text("#found"))[0].replace(",", ""))  # type: ignore[index]


def says(page: Any, start: str) -> None:
    """Waits until the page says how many requests fit (typing is answered after a moment)."""
    playwright.expect(page.locator("#found")).to_have_text(re.compile(f"^{start}"))


def test_filters_and_pages_change_what_is_shown(visit: Open) -> None:
    page = visit()
    heads = lambda: page.locator("#cases h3").all_inner_texts()  # noqa: E731
    assert found(page) == 36 and page.locator(".case").count() == 4 and page.locator(".case").first.locator(".reply").count() == len(TRUTH)
    assert page.inner_text("#where") == "Page 1 of 9" and page.locator("#previous").is_disabled()
    first = heads()
    page.click("#next")
    assert heads() != first and page.inner_text("#where") == "Page 2 of 9"
    page.click("#last")
    assert page.locator("#next").is_disabled() and page.locator(".case").count() == 4

    page.select_option("#f-emotion", label="fear")
    assert found(page) == 6 and page.inner_text("#where") == "Page 1 of 2" and all("fear" in head.lower() for head in heads())
    page.select_option("#f-valence", label="negative")
    assert found(page) == 2 and all("negative" in head for head in heads()) and page.locator("#pager").is_hidden()
    page.select_option("#f-theme", label=HOSTILE_THEME)
    assert page.locator(".case").count() == 0 and "No reply fits" in page.inner_text("#found")
    page.click("button[type=reset]")
    says(page, "36")

    page.select_option("#f-kind", label="plain event")
    assert found(page) == 12 and all("plain event" in head for head in heads())
    page.select_option("#f-kind", value="")
    page.select_option("#f-method", label="Circuit")
    page.select_option("#f-good", label="good")
    matched = found(page)
    assert 0 < matched < 36 and page.locator(".reply.fits").count() == 4 and page.locator(".reply.other").count() == 4 * (len(TRUTH) - 1)
    assert set(page.locator(".reply.fits h4").all_inner_texts()) == {"Circuit"} and "\u2713" in page.inner_text(".reply.fits .marks")
    marks = page.locator(".reply.fits .marks").first.inner_text()
    assert "\u2713 good" in marks and "panel: " in marks and all(f"{judge}: " in marks for judge in JUDGES) and "answers, 0.93" in marks
    page.select_option("#f-good", label="not good")
    assert found(page) == 36 - matched
    page.check("#f-only")
    assert page.locator("#cases .reply").count() == page.locator(".reply.fits").count() <= 4

    page.click("button[type=reset]")
    says(page, "36")
    page.select_option("#f-good", label="not judged")
    assert found(page) == 1 and page.locator(".reply.fits").inner_text().count("not judged") == 1
    page.select_option("#f-good", value="")
    page.select_option("#f-sound", label="unsound")
    assert 0 < found(page) < 36 and "repetition" in page.inner_text(".reply.fits .marks")
    page.select_option("#f-sound", value="")
    page.fill("#f-text", "Reply 3 by RESIDUAL to wish 5")
    says(page, "1 of")
    assert heads()[0].lower().startswith("disgust asked for")


def test_unsteered_replies_are_held_against_the_emotion_of_the_request(visit: Open) -> None:
    """One reply, six requests: it is good for at most one of them."""
    page = visit()
    page.select_option("#f-method", label="Unsteered")
    page.fill("#f-text", "Reply 1 by none")
    says(page, "6 of")
    page.select_option("#f-good", label="good")
    assert found(page) <= 1
    page.select_option("#f-good", label="not good")
    assert found(page) >= len(EMOTIONS) - 1


def test_hostile_replies_are_shown_and_do_nothing(visit: Open) -> None:
    page = visit()
    page.fill("#f-text", "window.hacked = 1")
    says(page, "1 of")
    shown = page.locator(".reply.fits .text").inner_text()
    assert "</script><script>window.hacked = 1</script>" in shown and "{{ 7 * 7 }}" in shown
    assert page.evaluate("window.hacked") is None and page.locator("#cases script, #cases img").count() == 0


def test_keyboard_reaches_folds_filters_and_tables(visit: Open) -> None:
    page = visit()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.evaluate("document.activeElement.getBoundingClientRect().left") >= 0, "the focused skip link is out of sight"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    fold = page.locator("#fig-frontier details.data")
    assert not fold.locator("table").is_visible()
    fold.locator("summary").focus()
    page.keyboard.press("Enter")
    assert fold.locator("table").is_visible()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "scroll", "a table that scrolls takes the focus"
    unnamed = page.evaluate(
        "[...document.querySelectorAll('input, select, button')].filter((f) => !(f.labels?.length || f.textContent.trim())).length"
    )
    assert unnamed == 0


def test_prints_legibly_without_filters(visit: Open) -> None:
    page = visit(1280, "dark")
    page.emulate_media(media="print")
    assert page.locator("#filters").is_hidden() and page.locator("nav").is_hidden() and page.locator("#pager").is_hidden()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)", "paper is white in the dark scheme too"
    assert page.locator("#fig-frontier .wide .plot").is_visible() and page.locator("#fig-heads .plot").first.is_visible()
    printed = page.pdf(format="A4")
    assert printed.startswith(b"%PDF") and 8 <= len(re.findall(rb"/Type\s*/Page\b", printed)) <= 40


def test_disagreements_open_and_hold_every_vote(visit: Open) -> None:
    page = visit()
    fold = page.locator("#panel details.more").last
    assert not fold.locator(".reply").first.is_visible()
    fold.locator("summary").click()
    assert fold.locator(".reply").count() == 40 and fold.locator(".reply").first.is_visible()
    assert all(judge in fold.locator(".marks").first.inner_text() for judge in JUDGES)


def test_without_scripts_everything_but_the_replies_is_there(visit: Open) -> None:
    page = visit(390, java_script_enabled=False)
    assert page.locator("#fig-heads .plot").first.is_visible() and page.locator("noscript").first.is_visible()
    assert page.locator("#filters").is_hidden()
