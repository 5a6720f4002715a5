"""What code and documents say of each other holds: cited sections, named files, links, commands and the figures of the README."""

from __future__ import annotations

import itertools
import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from bench import showcase
from emosteer.cli.main import app
from emosteer.generation.decoding import Decoding
from tests import commands, from_wheel

ROOT = Path(__file__).parents[1]
SOURCES = [path for folder in ("emosteer", "tests") for path in sorted((ROOT / folder).rglob("*.py")) if path != Path(__file__)]


def test_every_cited_section_of_the_method_exists() -> None:
    sections = set(re.findall(r"^## (\d+)\.", (ROOT / "docs" / "METHOD.md").read_text("utf-8"), re.M))
    cited = {(path.name, number) for path in SOURCES for number in re.findall(r"METHOD(?:\.md)? section (\d+)", path.read_text("utf-8"))}
    assert len(cited) >= 7 and {number for _, number in cited} <= sections


def test_every_document_that_is_named_exists() -> None:
    package = [path for path in SOURCES if path.is_relative_to(ROOT / "emosteer")]
    pages = [*package, ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    named = {(page.name, name) for page in pages for name in re.findall(r"\b(?:docs|bench)/[A-Z_]+\.md\b", page.read_text("utf-8"))}
    assert len(named) >= 10
    assert not [(page, name) for page, name in sorted(named) if not (ROOT / name).is_file()]


def test_the_reference_of_commands_is_what_the_commands_say() -> None:
    assert commands.PAGE.read_text("utf-8") == commands.page(), "run `make commands`"
    head, *sections = commands.page().split("\n## emosteer ")
    assert {section.split("\n", 1)[0] for section in sections} == set(re.findall(r"^- \[`emosteer ([a-z ]+)`\]", head, re.M))
    generate = next(section for section in sections if section.startswith("generate\n"))
    tokens = Decoding().max_new_tokens
    assert f"| `--max-new-tokens INTEGER` | Longest reply, in tokens. | `{tokens}` |" in generate
    assert "| `--emotion TEXT`, `-e TEXT` | One emotion, several with commas, or 'all'. |  |" in generate


def slugs(page: Path) -> set[str]:
    """What a link may name in a page: its headings, as GitHub and the site spell them."""
    return {
        re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")
        for title in re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.M)
    }


def test_no_link_between_the_documents_is_dead() -> None:
    dead, count = [], 0
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.S)
        for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
            count += 1
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            if not target.exists() or (anchor and anchor not in slugs(target)):
                dead.append((page.name, link))
    assert count > 60 and not dead


def test_every_page_is_on_the_site_and_one_click_from_the_readme() -> None:
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    listed = re.findall(r": ([\w]+\.md)$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.M)
    assert sorted(listed) == sorted(pages)
    start = {"README.md", "docs/index.md"}
    linked = {Path(link).name for name in start for link in re.findall(r"\]\(([\w/]+\.md)", (ROOT / name).read_text("utf-8"))}
    assert pages <= linked


#: What a newcomer asks: the page and section that answers, and what the answer says.
QUESTIONS = {
    "Where is the circuit's file?": ("docs/GUIDES.md", "Find the circuit's file", "artifacts/MODEL/circuit.safetensors"),
    "How strong should I set it?": ("docs/GUIDES.md", "Choose how strong", "Stay at 75 or below"),
    "Does it work with my model?": ("docs/GUIDES.md", "Use another model", "emosteer models check REF"),
    "How long will it take?": ("docs/GUIDES.md", "Know what it costs before it begins", "emosteer extract --dry-run"),
    "Do I need a GPU?": ("docs/GUIDES.md", "Know what it costs before it begins", "Nothing needs a GPU"),
    "What is missing on my machine?": ("docs/GUIDES.md", "See what is missing on your machine", "emosteer doctor"),
    "Can it do other emotions, from my own texts?": ("docs/GUIDES.md", "Bring your own data and emotions", "--emotions pride,shame,envy"),
    "How good are the replies?": ("docs/RESULTS.md", "Limits", "135M"),
    "Are my texts sent anywhere?": ("docs/SECURITY.md", "What leaves the machine", "endpoint"),
    "Does it run on Windows or a Mac?": ("docs/GUIDES.md", "Use it on Windows or macOS", "Untested"),
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_what_a_newcomer_asks_is_answered_within_two_clicks_of_the_readme(question: str) -> None:
    """One click to a page, or to one that links it, and the section is named so that it is found there."""
    page, title, answer = QUESTIONS[question]
    section = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#|\Z)", (ROOT / page).read_text("utf-8"), re.M | re.S)
    assert section and answer in section[1], f"{page} has no section '{title}' that says '{answer}'"
    clicked, seen = {ROOT / "README.md"}, set[Path]()
    for _ in range(2):
        links = [(at, link) for at in clicked for link in re.findall(r"\]\((?!https?:)([^)#\s]+\.md)", at.read_text("utf-8"))]
        clicked = {(at.parent / link).resolve() for at, link in links}
        seen |= clicked
    assert (ROOT / page).resolve() in seen


def readme_commands() -> list[list[str]]:
    """The command lines of README's, the tutorial's and the guides' code blocks that start with `emosteer`."""
    texts = [(ROOT / name).read_text("utf-8") for name in ("README.md", "docs/TUTORIAL.md", "docs/GUIDES.md")]
    blocks = [block for text in texts for block in re.findall(r"^```\n(.*?)^```", text, re.M | re.S)]
    lines = [line.removeprefix(".venv/bin/") for block in blocks for line in block.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("emosteer ")]


def test_the_commands_that_the_documents_print_are_known_to_the_command_line() -> None:
    """They are parsed, not run; a wrong option or a missing argument raises."""
    found = readme_commands()
    assert len(found) > 20
    for words in found:
        command = get_command(app)
        while hasattr(command, "commands"):
            name, *words = words
            command = command.commands[name]
        command.make_context(command.name, [word for word in words if word != "\\"])


def test_the_wheel_is_tried_with_every_command_and_with_what_the_readme_shows() -> None:
    """The lines of tests/from_wheel.py are parsed here, not run."""
    lines = [shlex.split(line)[1:] for line in from_wheel.EVERY.format(package=ROOT, data=from_wheel.DATA).strip().splitlines()]
    tried = set()
    for words in lines:
        command, name = get_command(app), []
        while hasattr(command, "commands") and words and not words[0].startswith("-"):
            name.append(words[0])
            command, words = command.commands[words[0]], words[1:]
        if name:
            command.make_context(command.name, words) if words != ["--help"] else None
            tried.add(" ".join(name))
    names = re.findall(r"^## emosteer ([a-z ]+)$", commands.page(), re.M)
    assert {*names} - tried <= {"models pull"}, "a new command belongs into EVERY of tests/from_wheel.py"
    steps = from_wheel.readme_steps()
    run = [step for step in steps if from_wheel.why_left_out(step) is None]
    assert len(run) >= 3 and run[0].startswith("emosteer generate") and sum(step.startswith("python -c") for step in run) == 1


def test_the_readme_is_a_screen_or_two_and_its_first_reply_stands_at_the_top() -> None:
    lines = (ROOT / "README.md").read_text("utf-8").splitlines()
    assert len(lines) <= 120 and any("emosteer generate" in line for line in lines[:25])


def table_rows(path: Path) -> list[list[str]]:
    """The cells of every table of a page, row by row."""
    lines = [line for line in path.read_text("utf-8").splitlines() if line.startswith("|")]
    return [[cell.strip(" *") for cell in line.split("|")[1:-1]] for line in lines]


def test_the_results_in_the_readme_are_those_that_were_measured() -> None:
    """The short table repeats the long one."""
    measured = {row[0]: row for row in table_rows(ROOT / "docs" / "RESULTS.md") if len(row) == 16}
    names = {"unsteered": "none", "residual steering": "residual", "learned residual vectors": "learned-residual", "circuit": "circuit"}
    names |= {"best prompt in the test (`stimulus`)": "prompt-stimulus"}
    short = {row[0]: row for row in table_rows(ROOT / "README.md") if row and row[0] in names}
    assert short.keys() == names.keys()
    for name, row in short.items():
        long = measured[names[name]]
        assert row[1].replace("**", "") == long[1] and row[2:] == [long[3].split()[0], *long[4:6]]


def test_the_gallery_counts_what_it_shows() -> None:
    head, *entries = re.split(r"^## ", (ROOT / "docs" / "GALLERY.md").read_text("utf-8"), flags=re.M)
    marks = [re.findall(r"^\*(reads .*)\*$", entry, re.M) for entry in entries]
    assert len(entries) == 24 and all(len(both) == 2 for both in marks)
    asked = [entry.split()[1].lower() for entry in entries]
    read = [sum(both[side].startswith(f"reads {emotion},") for emotion, both in zip(asked, marks, strict=True)) for side in (1, 0)]
    good = [sum(both[side].endswith(", good") for both in marks) for side in (1, 0)]
    assert re.findall(r"(\d+) of the 24 steered replies \(unsteered: (\d+)\)", head) == [tuple(map(str, read))]
    assert re.findall(r"(\d+) good \(unsteered: (\d+)\)", head) == [tuple(map(str, good))]


def test_the_figure_of_the_methods_shows_the_measured_table() -> None:
    measured = [row for row in table_rows(ROOT / "docs" / "RESULTS.md") if len(row) == 16][2:10]
    drawn = (ROOT / "docs" / "methods.svg").read_text("utf-8")
    for row in measured:
        assert f"emotion {float(row[3].split()[0]):.0f} %, answers {float(row[4]):.0f} %" in drawn
    assert "prefers-color-scheme: dark" in drawn and "http" not in drawn.replace("http://www.w3.org", "")


def contrast(first: str, second: str) -> float:
    """WCAG's contrast of two colours, as "#rrggbb"."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted(map(luminance, (first, second)))
    return (high + 0.05) / (low + 0.05)


def test_all_text_of_the_terminal_picture_can_be_read() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    drawn = (ROOT / "docs" / "demo.svg").read_text("utf-8")
    paper = re.findall(r'<rect fill="(#\w{6})"', drawn)[0]
    inks = re.findall(r"\.demo-r\d+ \{ fill: (#\w{6})", drawn)
    assert len(inks) > 8 and min(contrast(ink, paper) for ink in inks) >= 4.5


def test_no_name_in_the_figure_of_the_methods_overlaps_another_or_a_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(showcase, "AXES", ((30, 75), (0, 100)))
    names = ("Prompt: stimulus", "Prompt: tone", "Residual steering", "Random circuit", "Prompt: system", "Unsteered")
    places = ((44, 18), (50, 17), (57, 13), (53, 4), (59, 3), (69, 3))
    points = [{"series": name, "x": x, "y": y} for name, (x, y) in zip(names, places, strict=True)]
    chosen = showcase.labelled(points)
    drawn = [showcase.box(point, where) for point, where in zip(points, chosen, strict=True)]
    assert not [pair for pair in itertools.combinations(drawn, 2) if showcase.meet(*pair)]
    dots = [showcase.box(point) for point in points]
    assert not [(i, j) for i, own in enumerate(drawn) for j, dot in enumerate(dots) if i != j and showcase.meet(own, dot)]
    above = [showcase.box(point, "above") for point in points]
    assert any(showcase.meet(*pair) for pair in itertools.combinations(above, 2)), "they would, all above their points"
