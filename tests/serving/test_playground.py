"""The playground in a real headless Chromium: every control, a silent console, nobody else asked for anything, phone and desktop,
light and dark.

Needs a Chromium on the PATH (`tests/helpers/browser.py` has the names) and playwright; what needs them is skipped with the reason where
either is missing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from emosteer.judges.protocol import LABELS, Opinion
from tests.helpers.browser import launched, require_browser

pytest.importorskip("starlette", reason="starlette is not installed; it comes with emosteer[serve]")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; it comes with emosteer[dev]")

import httpx  # noqa: E402

from tests.helpers.dialled import endless_model  # noqa: E402
from tests.helpers.server import Running, WordJudge, running  # noqa: E402

Open = Callable[..., Any]
HOSTILE = "<img src=x onerror=alert(1)> & 'quotes' stop"


@pytest.fixture(scope="module")
def served() -> Iterator[Running]:
    with running(endless_model()) as server:
        yield server


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    require_browser("the playground")
    with launched() as browser:
        yield browser


@pytest.fixture
def visit(chromium: Any, served: Running) -> Iterator[Open]:
    """Opens the page; fails at the end if it said anything on the console, but what the browser notes of an answer that is expected, or
    asked anybody else for anything."""
    problems: list[str] = []
    contexts = []

    def open_page(width: int = 1280, scheme: str = "light", noted: str = "nothing", server: Running = served) -> Any:
        context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, reduced_motion="reduce")
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: None if noted in message.text else problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda asked: None if asked.url.startswith((server.url, "data:")) else problems.append(asked.url))
        page.goto(server.url)
        page.wait_for_selector("#sliders .slider, #key-form:not([hidden])")
        page.fill("#max-tokens", "8") if page.is_visible("#max-tokens") else page.evaluate(
            "document.getElementById('max-tokens').value = 8"
        )
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not problems


def say(page: Any, text: str) -> None:
    """Says something and waits until the reply was read."""
    before = page.locator(".turn.model .plot").count()
    page.fill("#say", text)
    page.press("#say", "Enter")
    playwright.expect(page.locator(".turn.model .plot")).to_have_count(before + 1)


def slide(page: Any, emotion: str, value: int, box: str = "#sliders") -> None:
    slider = page.locator(f"{box} .slider").filter(has_text=emotion).locator("input")
    slider.evaluate("(node, value) => { node.value = value; node.dispatchEvent(new Event('input')); }", value)


def test_a_conversation_with_a_mixture_an_arc_undo_and_new(visit: Open, served: Running) -> None:
    page = visit()
    slide(page, "sadness", 40)
    slide(page, "anger", 20)
    assert page.inner_text("#sum") == "anger:20 + sadness:40; 60 of 100"
    say(page, "the boss said stop")
    reply = page.locator(".turn.model")
    assert reply.locator(".who").inner_text() == "tiny-llama, anger:20 + sadness:40"
    assert reply.locator(".token").count() == 8 and reply.locator("polyline").count() == 6 and reply.locator(".bars li").count() == 4
    assert len(set(reply.locator(".token").evaluate_all("nodes => nodes.map((n) => getComputedStyle(n).backgroundColor)"))) > 1
    page.check("#arc-on")
    slide(page, "fear", 80, "#arc-sliders")
    page.fill("#arc-tokens", "6")
    say(page, HOSTILE)
    assert page.locator(".turn.user .text").nth(1).inner_text() == HOSTILE and page.locator("#log img").count() == 0
    assert page.locator(".turn.model .who").nth(1).inner_text() == "tiny-llama, anger:20 + sadness:40 -> fear:80 in 6 tokens"
    page.click("#undo")
    assert page.input_value("#say") == HOSTILE and page.locator(".turn.model").count() == 1
    slide(page, "anger", 90)
    assert "more than the text bears" in page.inner_text("#sum")
    page.click("#neutral")
    assert page.inner_text("#sum") == "neutral; 0 of 100"
    page.click("#new")
    assert page.locator(".turn").count() == 0 and page.is_disabled("#undo")


def test_before_the_key_is_given_nothing_is_sent_and_nothing_stays_locked(visit: Open) -> None:
    with running(endless_model(), api_key="secret") as keyed:
        page = visit(noted="status of 401", server=keyed)
        page.fill("#say", "the train was late")
        for control in ("#send", "#compare", "#curl", "#python"):
            page.evaluate("tell('')")
            page.click(control)
            assert page.inner_text("#state") == "Give the API key first." and page.is_enabled("#send") and page.is_enabled("#compare")
        page.click("#neutral")
        page.evaluate("document.getElementById('key-form').hidden = true")
        page.press("#say", "Enter")
        assert "has not yet said" in page.inner_text("#state"), "no key is asked for, as where the server is not there"
        page.evaluate("document.getElementById('key-form').hidden = false")
        page.fill("#key", "secret")
        page.press("#key", "Enter")
        page.wait_for_selector("#sliders .slider")
        page.evaluate("document.getElementById('max-tokens').value = 8")
        assert page.input_value("#say") == "the train was late"
        say(page, "the train was late")


def test_controls_are_as_they_must_be_whatever_the_browser_brings_back(visit: Open) -> None:
    """Firefox restores over a reload which buttons were disabled and which boxes were ticked."""
    page = visit()
    page.evaluate(
        """() => {
            for (const id of ['send', 'compare']) document.getElementById(id).disabled = true;
            for (const id of ['stop', 'undo', 'new']) document.getElementById(id).disabled = false;
            document.getElementById('arc-on').checked = true;
            return begin();
        }"""
    )
    assert page.is_enabled("#send") and page.is_enabled("#compare")
    assert page.is_disabled("#stop") and page.is_disabled("#undo") and page.is_disabled("#new")
    assert page.is_visible("#arc-box"), "the box of a ticked arc"


def test_a_reply_is_read_out_once_and_only_when_it_is_whole(visit: Open, served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    page = visit()
    assert set(page.locator(".slider output").evaluate_all("nodes => nodes.map((n) => n.getAttribute('aria-live'))")) == {"off"}
    usual = served.writer.batch.step
    monkeypatch.setattr(served.writer.batch, "step", lambda: time.sleep(0.05) or usual())
    page.fill("#say", "the train was late")
    page.press("#say", "Enter")
    playwright.expect(page.locator(".turn.model .text")).not_to_be_empty()
    assert page.get_attribute("#log", "aria-busy") == "true" and page.get_attribute(".turn.model", "aria-live") is None
    playwright.expect(page.locator(".turn.model .plot")).to_have_count(1)
    assert page.get_attribute("#log", "aria-busy") is None
    assert page.get_attribute(".turn.model", "aria-live") == "off", "what was read in the reply comes after it and is not read out"


def told_by(monkeypatch: pytest.MonkeyPatch, opinion: Opinion) -> None:
    """The judge has this opinion of everything."""
    monkeypatch.setattr(WordJudge, "opinions", lambda self, texts, done=None: [opinion for _ in texts])


def test_a_judge_whose_call_failed_has_read_nothing(served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def reading() -> dict[str, Any]:
        asked = {"messages": [{"role": "user", "content": "the train"}], "reply": "the boss said stop"}
        found: dict[str, Any] = httpx.post(served.url + "/v1/readings", json=asked, timeout=30).json()
        return found

    told_by(monkeypatch, Opinion(None, "no answer came"))
    found = reading()
    assert found["judge"] is None and found["problem"] == "no answer came" and found["sound"] is True and found["tokens"]
    told_by(monkeypatch, Opinion(None))
    assert reading()["problem"] == "no reason given"
    told_by(monkeypatch, Opinion({**dict.fromkeys(LABELS, 0.0), "fear": 1.0}, "one of three did not answer"))
    assert reading()["judge"]["label"] == "fear", "a panel of which one judge failed has read it all the same"


def test_a_judge_whose_call_failed_is_said_so(visit: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    told_by(monkeypatch, Opinion(None, "no answer came"))
    page = visit()
    say(page, "the train was late")
    assert page.inner_text(".turn.model .read >> nth=0") == "No judge read it: no answer came"
    page.click("#compare")
    playwright.expect(page.locator(".card .read").filter(has_text="no judge read it: no answer came")).to_have_count(7)


def test_side_by_side_the_map_and_copies(visit: Open, served: Running) -> None:
    page = visit()
    page.click("#compare")
    assert "Write a message first" in page.inner_text("#state")
    page.fill("#say", "the train was late")
    page.click("#compare")
    playwright.expect(page.locator(".card .read").filter(has_text="read as")).to_have_count(7)
    assert page.locator(".card h3").all_inner_texts()[:3] == ["neutral", "anger 75", "sadness 75"]
    label = page.locator("#map svg").get_attribute("aria-label")
    page.select_option("#map-emotion", "disgust")
    assert page.locator("#map svg").get_attribute("aria-label") != label and "disgust" in page.locator("#map svg").get_attribute(
        "aria-label"
    )
    slide(page, "fear", 60)
    say(page, "it's late")
    page.click("#curl")
    text = page.inner_text("#copy-text")
    assert text.startswith(f"curl {served.url}/v1/chat/completions") and '"fear": 60' in text and "it'\\''s late" in text
    page.click("#copy-do")
    playwright.expect(page.locator("#copy-said")).to_have_text(re.compile("^(Copied|Selected; copy it with the keyboard)$"))
    page.keyboard.press("Escape")
    page.click("#python")
    code = page.inner_text("#copy-text")
    compile(code, "copied", "exec")
    assert f'base_url="{served.url}/v1"' in code and '"mix":{"fear":60}' in code
    page.click("#copy-close")


def test_a_reply_is_stopped_by_escape_and_a_refusal_is_shown(visit: Open, served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    page = visit(noted="status of 400")
    usual = served.writer.batch.step
    monkeypatch.setattr(served.writer.batch, "step", lambda: time.sleep(0.02) or usual())
    page.evaluate("document.getElementById('max-tokens').value = 120")
    page.fill("#say", "the train was late")
    page.press("#say", "Enter")
    playwright.expect(page.locator(".turn.model .text")).not_to_be_empty()
    page.keyboard.press("Escape")
    playwright.expect(page.locator("#state")).to_have_text("Stopped")
    playwright.expect(page.locator(".turn.model .plot")).to_have_count(1)
    assert page.is_enabled("#send") and page.is_disabled("#stop")
    until = time.monotonic() + 10
    while served.writer.batch.n_rows:
        assert time.monotonic() < until, "the rows of the reply that was stopped are free"
        time.sleep(0.01)
    page.evaluate("document.getElementById('guidance').value = 30")
    page.fill("#say", "again")
    page.click("#send")
    playwright.expect(page.locator("#state")).to_contain_text("guidance")
    assert page.locator(".turn").count() == 2 and page.input_value("#say") == "again"


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_sticks_out_and_everything_is_named_and_readable(visit: Open, width: int, scheme: str) -> None:
    page = visit(width, scheme)
    slide(page, "fear", 60)
    say(page, "the boss said stop")
    page.evaluate("document.querySelectorAll('details').forEach((fold) => { fold.open = true; })")
    page.check("#arc-on")
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('input, textarea, select, button')].filter((node) =>
            !(node.labels?.length || node.textContent.trim() || node.getAttribute('aria-label'))).map((node) => node.id)"""
    )
    assert not nameless
    colours = page.evaluate(
        """() => {
            const style = getComputedStyle(document.documentElement);
            const names = ['paper', 'ink', 'muted', 'main', 'on-main', 'bad', 'raised', 'e0', 'e1', 'e2', 'e3', 'e4', 'e5'];
            return Object.fromEntries(names.map((name) => [name, style.getPropertyValue('--' + name).trim()]));
        }"""
    )
    for name, least in (("ink", 4.5), ("muted", 4.5), ("bad", 4.5), *((f"e{index}", 3.0) for index in range(6))):
        assert contrast(colours[name], colours["paper"]) >= least, name
    assert contrast(colours["on-main"], colours["main"]) >= 4.5 and contrast(colours["muted"], colours["raised"]) >= 4.5


def contrast(first: str, second: str) -> float:
    """Contrast ratio of two colours "#rrggbb", by the formula of WCAG 2."""

    def luminance(colour: str) -> float:
        parts = [int(pair, 16) / 255 for pair in re.findall("..", colour.removeprefix("#"))]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_by_keyboard_alone(visit: Open) -> None:
    page = visit()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    page.keyboard.type("the train was late")
    page.keyboard.press("Enter")
    playwright.expect(page.locator(".turn.model .plot")).to_have_count(1)
    page.locator("#mix-0").focus()
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#sum").startswith("anger:5")
