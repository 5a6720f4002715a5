"""The report: complete, honest about what is missing, self-contained, and inert whatever the replies say."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import math
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from emosteer.attribution.scores import Scores
from emosteer.base.errors import ArtifactError
from emosteer.base.files import write_text
from emosteer.circuits.circuit import Circuit
from emosteer.circuits.methods import CONTEST
from emosteer.circuits.places import Places
from emosteer.cli import main as cli
from emosteer.evaluation.evaluate import evaluate
from emosteer.evaluation.metrics import measure
from emosteer.evaluation.settings import Budget, EvaluationSettings
from emosteer.report import contest_figures, page
from emosteer.report.commands import made_by, maker
from emosteer.report.disputes import disputes
from emosteer.report.inputs import WHAT, read_inputs
from emosteer.report.measured import EARLIER, Measured
from emosteer.report.page import build_report, commands
from emosteer.report.panels import square
from emosteer.report.plots import Steps, slim
from emosteer.report.replies import browser, evenly, rounded
from emosteer.report.sections import sections
from emosteer.report.verdict import BAD, GOOD, MIXED, UNKNOWN, Finding, verdict
from emosteer.report.wording import (
    Interval,
    kind_label,
    label,
    number,
    number_range,
    ordered,
    percent,
    percent_range,
    plural,
    points_range,
    share_range,
    shortened,
    words,
)
from emosteer.scenarios.scenarios import EMOTIONS
from tests.helpers import contest_setup
from tests.helpers.report_setup import (
    HEADS,
    HOSTILE,
    HOSTILE_THEME,
    JUDGED,
    JUDGES,
    LAYERS,
    MODEL,
    PARTS,
    TRUTH,
    agreement,
    around,
    calibration,
    circuit,
    compared,
    contamination,
    dial_check,
    evaluation,
    panel_of_words,
    reply_rows,
    result,
    undefined_colours,
    whole_page,
    write_all,
)

FIGURES = {"outcome", "frontier", "differences", "by-emotion", "by-valence", "confusion", "calibration", "dial-check", "naming", "holding"}
FIGURES |= {"by-kind", "judges", "contamination", "layers", "map", "heads", "neurons", "importance", "curves", "drawn", "shared"}
TRUTH_IN_ORDER = ordered(TRUTH)
VOID = {"meta", "link", "br", "input", "img", "hr"}


# ---- reading a page ----------------------------------------------------------------------------------------------------


@dataclass
class Node:
    """One element of a page."""

    tag: str
    attributes: dict[str, str]
    children: list[Node | str] = field(default_factory=list)

    def all(self, tag: str, **wanted: str) -> list[Node]:
        """Descendants of a tag whose attributes are as wanted (`class_` holds a word of the class)."""
        named = {name.rstrip("_"): value for name, value in wanted.items()}
        fits = lambda node: all(  # noqa: E731
            value in node.attributes.get(name, "").split() if name == "class" else node.attributes.get(name) == value
            for name, value in named.items()
        )
        return [node for node in self.walk() if node.tag == tag and fits(node)]

    def walk(self) -> Iterator[Node]:
        """Every descendant."""
        for child in self.children:
            if isinstance(child, Node):
                yield child
                yield from child.walk()

    @property
    def text(self) -> str:
        """All text inside."""
        return "".join(child if isinstance(child, str) else child.text for child in self.children)


class Reader(HTMLParser):
    """A page as a tree; unbalanced tags fail."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Node("", {})
        self.open = [self.root]
        self.feed(text)
        self.close()
        assert len(self.open) == 1, f"left open: {self.open[-1].tag}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        node = Node(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].children.append(Node(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


@pytest.fixture(scope="module")
def whole() -> Node:
    """The page of everything."""
    return Reader(whole_page()[1].path.read_text(encoding="utf-8")).root


def built(places: Places, tmp_path: Path) -> Node:
    """A page of some artefacts."""
    return Reader(build_report(places, tmp_path / "page.html").path.read_text(encoding="utf-8")).root


def figure(root: Node, name: str) -> Node:
    """A figure by its name."""
    return next(node for node in root.all("figure") if node.attributes["id"] == f"fig-{name}")


def tips(node: Node) -> list[str]:
    """The tooltips of a figure's marks."""
    return [title.text for svg in node.all("svg") for title in svg.all("title")]


# ---- complete --------------------------------------------------------------------------------------------------------------


def test_every_figure_is_there_with_text_alternative_table_and_source(whole: Node) -> None:
    figures = whole.all("figure")
    assert {node.attributes["id"].removeprefix("fig-") for node in figures} == FIGURES
    ids = [node.attributes["id"] for node in whole.walk() if "id" in node.attributes]
    assert len(ids) == len(set(ids)), "an id is used twice"
    for node in figures:
        drawings = node.all("svg")
        assert drawings and node.all("figcaption")[0].text.strip()
        for svg in drawings:
            assert svg.attributes["role"] == "img" and len(svg.attributes["aria-label"]) > 30
            assert svg.all("path") or svg.all("line") or svg.all("rect"), "an empty drawing"
        tables = node.all("table")
        assert tables and all(table.all("caption")[0].text.strip() and len(table.all("tr")) > 1 for table in tables)
        assert all(table.all("th", scope="col") and table.all("th", scope="row") for table in tables)
        links = [link for item in node.all("ul", class_="sources") for link in item.all("a")]
        assert links and all(link.attributes["href"].removeprefix("#") in ids for link in links)


def test_contents_and_landmarks_lead_to_sections_that_exist(whole: Node) -> None:
    ids = {node.attributes["id"] for node in whole.walk() if "id" in node.attributes}
    links = [link.attributes["href"] for nav in whole.all("nav") for link in nav.all("a")]
    assert len(links) >= 10 and {link.removeprefix("#") for link in links} <= ids
    assert len(whole.all("main")) == len(whole.all("header")) == len(whole.all("footer")) == len(whole.all("h1")) == 1
    assert whole.all("html")[0].attributes["lang"] == "en" and whole.all("a", class_="skip")[0].attributes["href"] == "#main"
    levels = [int(node.tag[1]) for node in whole.walk() if re.fullmatch("h[1-6]", node.tag)]
    assert all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False)), "a level of headings is skipped"


def test_provenance_gives_file_hash_and_command_of_every_artefact(whole: Node) -> None:
    places, _ = whole_page()
    for name in PARTS:
        source = next(node for node in whole.walk() if node.attributes.get("id") == f"source-{name}")
        assert f"--model {MODEL}" in source.text
    for path in (places.directions, places.scores, places.circuit, places.folder / "evaluation" / "evaluation.json"):
        assert hashlib.sha256(path.read_bytes()).hexdigest() in whole.text


def test_head_map_shows_every_score_and_outlines_the_circuit(whole: Node) -> None:
    places, _ = whole_page()
    table, mine = Scores.load(places.scores).forms["contrast"].heads, Circuit.load(places.circuit).heads
    expected = [f"L{layer}H{h}: {number(table[e, layer, h].item())}" for e in range(6) for layer in range(LAYERS) for h in range(HEADS)]
    shown = figure(whole, "heads")
    assert sorted(tips(shown)) == sorted(expected)
    outlined = [path for path in shown.all("path") if path.attributes.get("stroke") == "var(--ink)"]
    assert len(outlined) == int(mine.sum())
    cells = [row for part in shown.all("table") for row in part.all("tr")[1:]]
    assert [cell.text for row in cells for cell in row.all("td")] == [number(v) for v in table.flatten().tolist()]


def test_the_circuit_is_drawn_unit_by_unit(whole: Node) -> None:
    places, _ = whole_page()
    made = Circuit.load(places.circuit)
    shown = tips(figure(whole, "drawn"))
    norms = made.z_delta.view(6, LAYERS, HEADS, -1).pow(2).sum(-1).sqrt()
    for e in range(6):
        for layer, head in made.heads[e].nonzero().tolist():
            assert f"L{layer}H{head} adds {number(norms[e, layer, head].item(), 3)}" in shown
    assert sum("neuron" in text for text in shown) == 12 and len(shown) == int(made.heads.sum()) + 12


def test_the_frontier_draws_the_points_below_the_limit_and_lists_all(whole: Node) -> None:
    shown = figure(whole, "frontier")
    points = [row for row in evaluation()["frontier"] if row["target"] == "all"]
    wide, narrow = (part.all("svg")[0] for part in (shown.all("div", class_="wide")[0], shown.all("div", class_="narrow")[0]))
    assert len(wide.all("title")) == len(narrow.all("title")) == sum(row["ratio"] <= 3 for row in points) == len(points) - 1
    assert len(shown.all("tr")) == len(points) + 1 and "1 point beyond" in shown.all("figcaption")[0].text


def cells(table: Node) -> dict[str, list[str]]:
    """A table's rows by their heading."""
    return {row.all("th")[0].text: [cell.text for cell in row.all("td")] for row in table.all("tr")[1:]}


def test_good_replies_stand_in_tables_and_words(whole: Node) -> None:
    parts = figure(whole, "by-emotion")
    assert f"Circuit: {percent_range(Interval(0.89, 0.84, 0.94))}" in tips(parts)
    assert "Share seen as asked for: anger 88" in figure(whole, "confusion").all("svg")[0].attributes["aria-label"]
    assert "Undecided" in figure(whole, "confusion").all("table")[0].text


def test_the_table_of_results_holds_good_its_parts_and_six_way_last(whole: Node) -> None:
    table = whole.all("table")[0]
    head = [cell.text for cell in table.all("tr")[0].all("th")]
    assert head[1] == "Good, %" and head[-1] == "Six-way, %" and "counted before there was a panel" in table.all("caption")[0].text
    row = result("prompt-tone")
    shares = [share_range(Interval.of(row[name])) for name in ("good", "emotion", "sound", "answers", "names", "accuracy")]
    numbers = [number_range(Interval.of(row[name])) for name in ("probability", "ratio")]
    assert cells(table)["Prompt: tone"] == [shares[0], "question 25.0", *shares[1:5], *numbers, "0", shares[5]]


def test_only_six_way_has_a_line_of_chance(whole: Node) -> None:
    """Whoever may say neutral does not guess one of six; the other lines are limits."""
    panels = {node.all("h4")[0].text: node for node in figure(whole, "outcome").all("div", class_="panel")}
    lined = {name for name, panel in panels.items() if [n for n in panel.all("line") if "stroke-dasharray" in n.attributes]}
    assert list(panels)[0] == "Good replies" and list(panels)[-1].startswith("Six-way")
    assert lined == {"Sound text", "Names the emotion", "Perplexity ratio", list(panels)[-1]}
    for name, lines in (("by-emotion", 0), ("by-valence", 0), ("by-kind", 0), ("judges", 0), ("contamination", 2), ("frontier", 2)):
        drawn = [n for n in figure(whole, name).all("line") if "stroke-dasharray" in n.attributes]
        assert len(drawn) == lines, name  # the frontier's two drawings have the budget


def test_kinds_of_prompt_are_drawn_worst_first_with_good_emotion_and_answers(whole: Node) -> None:
    shown = figure(whole, "by-kind")
    order = ["question", "small talk", "plain event", "vivid event"]
    names = dict(zip(order, ("question", "small-talk", "sev-plain", "sev-vivid"), strict=True))
    expected = [
        f"{kind}, {metric}: {percent_range(Interval.of(result(m)['by_kind'][names[kind]][metric]))}"
        for m in TRUTH
        for kind in order
        for metric in ("good", "emotion", "answers")
    ]
    assert sorted(tips(shown)) == sorted(expected)
    first = shown.all("svg")[0]
    assert [title.text.split(",")[0] for title in first.all("title")] == [kind for kind in order for _ in range(3)]
    assert first.attributes["aria-label"].startswith("Circuit by kind of prompt.") and "Worst: question." in first.attributes["aria-label"]
    assert len(shown.all("svg")) == len(TRUTH) and len(shown.all("details", class_="more")[0].all("svg")) == len(TRUTH) - 4
    for table, metric in zip(shown.all("table"), ("good", "emotion", "answers"), strict=True):
        assert [cell.text for cell in table.all("tr")[0].all("th")] == ["Method", *(kind.capitalize() for kind in order)]
        values = [percent_range(Interval.of(result("residual")["by_kind"][names[kind]][metric])) for kind in order]
        assert cells(table)["Residual steering"] == values


def test_every_judge_stands_beside_the_panel(whole: Node) -> None:
    shown = figure(whole, "judges")
    row = result("circuit")
    alone = [percent(row["judges"][judge]) for judge in JUDGES]
    assert cells(shown.all("table")[0])["Circuit"] == [percent_range(Interval.of(row["emotion"])), *alone]
    panels = {node.all("h4")[0].text: tips(node) for node in shown.all("div", class_="panel")}
    assert list(panels) == ["The panel", *JUDGES]
    for judge in JUDGES:
        assert panels[judge] == [f"{label(m)}: {percent(result(m)['judges'][judge])}" for m in TRUTH_IN_ORDER]
    assert [text for text in panels["The panel"] if text.startswith("Circuit")] == [
        f"Circuit: {percent_range(Interval.of(row['emotion']))}"
    ]


def test_agreement_stands_in_a_table(whole: Node) -> None:
    (section,) = [node for node in whole.all("section") if node.attributes["id"] == "panel"]
    table = section.all("table")[0]
    pairs = {f"Same label: {pair.replace(' - ', ' and ')}": [percent(share)] for pair, share in agreement()["pairs"].items()}
    expected = {"Krippendorff's alpha, all judges": ["0.71"], "Replies without a majority": ["4.6\u202f%"], **pairs}
    assert cells(table) == expected and "5,123 different replies" in table.all("caption")[0].text


def test_contamination_stands_in_tables_and_a_figure(whole: Node) -> None:
    (section,) = [node for node in whole.all("section") if node.attributes["id"] == "topic"]
    summary, *_, words_of_main = section.all("table")
    found = contamination("circuit")
    assert found and cells(summary)["Circuit"] == [
        *(percent(found[name]) for name in ("accuracy", "subject", "chance")),
        "5.0\u202f%",
        "960",
    ]
    assert "Unsteered" not in cells(summary) and len(cells(summary)) == len(TRUTH) - 1
    assert cells(words_of_main)["Residual steering: anger"] == ["20.0\u202f%", "0.0\u202f%", "refund 5.2, manager 3.5"]
    assert cells(words_of_main)["Circuit: fear"][-1] == "dark 4.1" and len(cells(words_of_main)) == 4 * 6
    shown = figure(whole, "contamination")
    assert len(cells(shown.all("table")[0])) == 6 * (len(TRUTH) - 1)
    for name, part in zip(("accuracy", "subject"), shown.all("div", class_="panel"), strict=True):
        assert f"Circuit: {percent(found[name])}" in tips(part) and len(tips(part)) == len(TRUTH) - 1


def test_words_of_the_page_are_explained(whole: Node) -> None:
    (section,) = [node for node in whole.all("section") if node.attributes["id"] == "terms"]
    terms = {node.text for node in section.all("dt")}
    assert {"Good", "Panel", "Emotion", "Answers", "Six-way", "Contamination", "Kinds of prompt", "Krippendorff's alpha"} <= terms
    assert not terms & {"Accuracy", "Match"} and "On topic" not in section.text


# ---- disagreements -----------------------------------------------------------------------------------------------------------


def disputed(text: str, labels: tuple[str | None, ...], share: float = 0.9, judged: str | None = None) -> dict[str, Any]:
    """A test reply with three judges, each sure of its label to the same degree."""
    rest = (1 - share) / 6
    opinions = {
        judge: None if seen is None else {one: share if one == seen else rest for one in JUDGED}
        for judge, seen in zip(JUDGES, labels, strict=True)
    }
    first = next((seen for seen in labels if seen is not None and labels.count(seen) > 1), "undecided")
    return {**reply_rows(groups=1)[1], "text": text, "opinions": opinions, "judged": judged or first}


def test_replies_without_a_majority_are_drawn_by_hash_then_those_furthest_apart() -> None:
    split = [disputed(f"split {i}", ("fear", "anger", "neutral")) for i in range(60)]
    close = [disputed(f"close {i}", ("fear", "fear", "anger"), share=0.3) for i in range(5)]
    far = [disputed(f"far {i}", ("fear", "fear", "anger"), share=0.95) for i in range(5)]
    alike = [disputed(f"alike {i}", ("fear", "fear", "fear")) for i in range(5)]
    found = disputes([*alike, *close, *far, *split, split[0]])
    by_hash = sorted((row["text"] for row in split), key=lambda text: hashlib.sha256(text.encode()).hexdigest())
    assert [d.text for d in found.listed] == by_hash[:40] and (found.total, found.undecided) == (70, 60)
    some = disputes([*alike, *close, *far, *split[:2]], most=7)
    assert {d.text for d in some.listed} == {"split 0", "split 1", *(f"far {i}" for i in range(5))}
    texts = [d.text for d in some.listed]
    assert texts == sorted(texts, key=lambda text: hashlib.sha256(text.encode()).hexdigest())
    assert disputes(reversed([*alike, *close, *far, *split])) == disputes([*split, *far, *close, *alike])


def test_a_judge_that_said_nothing_is_said_so_and_leaves_the_panel_undecided() -> None:
    (found,) = disputes([disputed("x", ("fear", None, None), judged="undecided")]).listed
    assert [vote.label for vote in found.votes] == ["fear", None, None] and found.judged == "undecided"
    assert found.votes[0].share == pytest.approx(0.9) and found.votes[0].target == pytest.approx(
        (0.1 / 6) if found.target != "fear" else 0.9
    )


def test_disagreements_are_listed_with_prompt_reply_target_and_every_vote(whole: Node) -> None:
    (listed,) = whole.all("ol", class_="disputes")
    rows = {row["text"].replace("\ud800", "?"): row for row in whole_page_rows()}
    items = [node for node in listed.all("li", class_="reply")]
    assert len(items) == 40
    for item in items:
        row = rows[item.all("p", class_="text")[0].text]
        assert item.all("blockquote")[0].text == row["prompt"]
        assert len({max(shares, key=shares.get) for shares in row["opinions"].values()}) == 3, "those without a majority first"
        asked = "no emotion asked for" if row["emotion"] == "none" else f"{row['emotion']} asked for"
        assert item.all("h4")[0].text == f"{label(row['method'])} · {asked} · {kind_label(row['kind'])}"
        panel, *votes = (mark.text for mark in item.all("ul", class_="marks")[0].all("li"))
        assert panel == f"panel: {row['judged']}"
        for vote, (judge, shares) in zip(votes, row["opinions"].items(), strict=True):
            seen = max(shares, key=shares.get)
            end = f", {row['emotion']} {shares[row['emotion']]:.2f}" if row["emotion"] not in ("none", seen) else ""
            assert vote == f"{judge}: {seen} {shares[seen]:.2f}{end}"


def whole_page_rows() -> list[dict[str, Any]]:
    """The replies that the page of everything was made from."""
    path = whole_page()[0].folder / "evaluation" / "test-replies.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_calibration_marks_strengths_that_broke(whole: Node) -> None:
    shown = tips(figure(whole, "calibration"))
    assert sum("the text broke" in text for text in shown) == 2 * 2 * 6 and len(shown) == 7 * 2 * 6


# ---- self-contained ----------------------------------------------------------------------------------------------------------


def test_small_and_the_same_bytes_again(tmp_path: Path) -> None:
    _, made = whole_page()
    assert made.size == made.path.stat().st_size < 5_000_000 and made.replies == made.replies_total == 330 and not made.missing
    places = write_all(tmp_path, ("directions", "replies"))
    first, second = (build_report(places, tmp_path / name).path.read_bytes() for name in ("1.html", "2.html"))
    assert first == second and str(tmp_path).encode() not in first


def test_nothing_is_loaded_from_anywhere(whole: Node) -> None:
    for node in whole.walk():
        for name, value in node.attributes.items():
            if name in ("src", "href", "srcset", "poster", "action", "formaction", "background", "data", "xlink:href", "ping"):
                assert value.startswith(("#", "data:,")), f"<{node.tag} {name}={value}>"
            assert not name.startswith("on"), f"<{node.tag} {name}>"
            assert name == "aria-label" or "url(" not in value
        assert node.tag not in ("iframe", "object", "embed", "base", "form") or "action" not in node.attributes
    style = whole.all("style")[0].text
    assert len(whole.all("style")) == 1 and "@import" not in style and "url(" not in style and "//" not in style


def test_the_policy_allows_this_script_and_nothing_else(whole: Node) -> None:
    policy = next(meta.attributes["content"] for meta in whole.all("meta") if "http-equiv" in meta.attributes)
    code = [node for node in whole.all("script") if node.attributes.get("type") != "application/json"]
    assert len(code) == 1 and "default-src 'none'" in policy and "script-src 'sha256-" in policy
    (style,) = whole.all("style")
    for name, text in (("script-src", code[0].text), ("style-src-elem", style.text)):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{name} 'sha256-{digest}';" in policy, name
    for name in ("script-src", "default-src", "style-src-elem"):
        assert "unsafe" not in policy.partition(f"{name} ")[2].partition(";")[0]


# ---- replies -----------------------------------------------------------------------------------------------------------------


def test_hostile_text_stays_text(whole: Node) -> None:
    scripts = whole.all("script")
    assert len(scripts) == 2 and not whole.all("img")
    data = json.loads(next(node.text for node in scripts if node.attributes.get("type") == "application/json"))
    texts = [row[2] for rows in data["replies"] for row in rows]
    assert HOSTILE.replace("\ud800", "?") in texts and HOSTILE_THEME in {prompt[2] for prompt in data["prompts"]}
    raw = whole_page()[1].path.read_text(encoding="utf-8")
    assert "window.hacked" in raw and "<script>window.hacked" not in raw and "<img" not in raw


def test_hostile_names_in_the_evaluation_stay_text(tmp_path: Path) -> None:
    bad = '<script>alert(1)</script>"onload="x'
    rows = [
        {**result("circuit"), "by_valence": {bad: {"good": around(0.5)}}, "judges": {bad: 0.5}, "by_kind": {bad: {}}, "worst_kind": bad},
        {**result("none"), "method": bad},
    ]
    places = write_all(tmp_path, ("evaluation",), results=rows, comparisons=[], frontier=[{**rows[0], "method": bad, "setting": 1, "target": "all", "good": 0.5, "ratio": 1.0}])  # fmt: skip  # noqa: E501
    root = built(places, tmp_path)
    assert len(root.all("script")) == 1 and bad.lower() in figure(root, "by-kind").text.lower()
    assert all(bad in figure(root, name).text for name in ("frontier", "outcome", "judges"))


def test_hostile_names_of_model_and_emotions_stay_text(tmp_path: Path) -> None:
    """They come out of files that somebody else may have made."""
    bad = "<img src=x onerror=alert(1)>'\"</title><script>alert(2)</script>"
    text = json.dumps(evaluation()).replace('"anger"', json.dumps(bad))
    places = write_all(tmp_path, ("evaluation",), **{**json.loads(text), "model": bad})
    root = built(places, tmp_path)
    assert len([node for node in root.all("script") if node.attributes.get("type") != "application/json"]) == 1 and not root.all("img")
    assert bad in root.all("title")[0].text and bad in root.all("h1")[0].text and bad.lower() in root.text.lower()
    assert not [node for node in root.walk() if any(name.startswith("on") for name in node.attributes)]


def test_all_methods_of_evenly_chosen_prompts_fit_the_budget() -> None:
    rows = reply_rows(groups=60)
    everything = browser(rows, EMOTIONS, 10**9)
    assert (everything.shown, everything.prompts_shown) == (len(rows), 60)
    budget = len(json.dumps(everything.data, ensure_ascii=False)) // 3
    some = browser(rows, EMOTIONS, budget)
    assert 15 <= some.prompts_shown <= 21 and len(everything.data["judges"]) == 3
    assert some.shown == some.prompts_shown * 55 and some.total == len(rows)
    assert len(json.dumps(some.data, ensure_ascii=False, separators=(",", ":")).encode()) <= 1.1 * budget
    assert all(len(group) == 55 for group in some.data["replies"])
    valences = [prompt[1] for prompt in some.data["prompts"]]
    assert max(map(valences.count, set(valences))) - min(map(valences.count, set(valences))) <= 3
    kinds = [prompt[4] for prompt in some.data["prompts"]]
    assert set(kinds) == {"vivid event", "plain event"} and abs(kinds.count("vivid event") - 3 * kinds.count("plain event")) <= 4
    assert browser(rows, EMOTIONS, 0).shown == 0 and browser([], EMOTIONS, 100).total == 0


@pytest.mark.parametrize("count", [1, 7, 100])
def test_evenly_takes_as_many_as_fit_at_equal_steps(count: int) -> None:
    sizes = [10] * count
    for budget in range(0, 10 * count + 20, 7):
        picked = evenly(sizes, budget)
        assert len(picked) == min(count, budget // 10) and picked == sorted(set(picked))
        steps = [b - a for a, b in zip(picked, picked[1:], strict=False)]
        assert not steps or max(steps) - min(steps) <= 1


def test_unsteered_replies_are_held_against_every_emotion() -> None:
    rows = [row for row in reply_rows(groups=1) if row["method"] == "none"]
    (packed,) = browser(rows, EMOTIONS, 10**6).data["replies"][0]
    assert packed[0] >= len(EMOTIONS) and packed[4] == [round(rows[0]["probabilities"][e], 2) for e in EMOTIONS]


def test_a_reply_keeps_what_makes_it_good_and_every_vote() -> None:
    """The script decides good from label, soundness, answer and naming, as the evaluation does."""
    (row,) = (r for r in reply_rows(groups=1) if (r["method"], r["emotion"]) == ("circuit", "fear"))
    row = {**row, "text": "I am afraid, and angry.", "answers": 0.4999, "sound": True}
    row["opinions"] = {**row["opinions"], JUDGES[1]: None}
    data = browser([row], EMOTIONS, 10**6).data
    ((packed,),) = data["replies"]
    labels = [max(shares, key=shares.get) if shares else None for shares in row["opinions"].values()]
    assert [None if vote is None else data["judged"][vote[0]] for vote in packed[9]] == labels and packed[9][0][1] == 0.88
    assert data["judges"] == list(JUDGES) and packed[10] == 0.4999 < data["answered"] and packed[5] == 1
    assert packed[11] == [EMOTIONS.index("fear")] * bool(measure(row, "fear", EMOTIONS)["names"])
    unsteered = {**row, "emotion": "none", "text": "So much anger, and fear."}
    ((packed,),) = browser([unsteered], EMOTIONS, 10**6).data["replies"]
    assert packed[11] == [i for i, e in enumerate(EMOTIONS) if measure(unsteered, e, EMOTIONS)["names"]] and len(packed[11]) == 2


def test_a_prompt_of_another_kind_has_no_theme() -> None:
    row = {**reply_rows(groups=1)[0], "kind": "small-talk", "theme": "small-talk", "valence": ""}
    assert browser([row], EMOTIONS, 10**6).data["prompts"] == [[row["prompt"], "", "", "work-000", "small talk"]]


def test_rounding_never_turns_a_reply_into_an_answer() -> None:
    assert [rounded(share) for share in (0.123, 0.4951, 0.4999, 0.5, 0.504)] == [0.12, 0.4951, 0.4999, 0.5, 0.5]


def test_what_was_left_out_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "REPLY_BYTES", 20_000)
    made = build_report(write_all(tmp_path, ("replies",), replies=reply_rows(groups=20)), tmp_path / "page.html")
    assert 0 < made.replies < made.replies_total == 1100
    text = Reader(made.path.read_text(encoding="utf-8")).root.text
    assert f"{made.replies:,} of 1,100 replies" in text and f"{1100 - made.replies:,} replies are left out" in text


# ---- what the stages really write ----------------------------------------------------------------------------------------------


def test_what_evaluate_writes_is_what_the_report_reads(tmp_path: Path) -> None:
    """A real contest of the tiny model: every method has its line, every reply its place, every figure its values."""
    model, planted, found = contest_setup.parts()
    settings = EvaluationSettings(doses=(0.5, 1.0), control_groups=2, budget=Budget(ratio=3.0, names=0.02, sound=0.5))
    sides = contest_setup.contest(tmp_path, batch_size=16), panel_of_words(tmp_path)
    kinds = [replace(group, kind="sev-plain" if i % 2 else group.kind) for i, group in enumerate(contest_setup.groups(6))]
    body, rows = evaluate(*sides, contest_setup.groups(2, 30), kinds, contest_setup.defaults(), settings)
    places = Places.of(model.name, tmp_path)
    planted.save(places.circuit)
    found.save(places.directions)
    own = {"model": model.name, "model_sha256": model.sha256, "circuit_sha256": "", "emotions": list(planted.emotions)}
    write_text(places.folder / "evaluation" / "evaluation.json", json.dumps({**evaluation(), **own, **body}))
    write_text(places.folder / "evaluation" / "test-replies.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    made = build_report(places, tmp_path / "page.html")
    root = Reader(made.path.read_text(encoding="utf-8")).root
    names = {node.attributes["id"].removeprefix("fig-") for node in root.all("figure")}
    assert names >= {"outcome", "frontier", "differences", "by-emotion", "by-kind", "by-valence", "confusion", "judges", "contamination"}
    assert not made.warnings and made.replies == made.replies_total == len(rows)
    lines = {row.all("th")[0].text: row.all("td")[0].text for row in root.all("table")[0].all("tr")[1:]}
    for line in body["results"]:
        assert lines[label(line["method"])] == share_range(Interval.of(line["good"]))
        alone = cells(figure(root, "judges").all("table")[0])[label(line["method"])]
        assert alone == [percent_range(Interval.of(line["emotion"])), *(percent(share) for share in line["judges"].values())]
    assert len(lines) == len(CONTEST) and len(figure(root, "by-kind").all("table")[0].all("tr")[0].all("th")) == 3
    section = next(node for node in root.all("section") if node.attributes["id"] == "panel")
    assert cells(section.all("table")[0])["Replies without a majority"] == [percent(body["agreement"]["undecided"])]
    assert len(section.all("li", class_="reply")) == min(40, disputes(rows).total)
    assert len(figure(root, "frontier").all("tr")) == 1 + 5 + 2 * 6 and len(figure(root, "confusion").all("svg")) == len(CONTEST)


# ---- missing -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "lost", "figures"),
    [
        (("directions",), ("scores", "circuit", "evaluation", "replies"), {"naming", "holding", "layers", "map"}),
        (("scores",), ("directions", "circuit", "evaluation", "replies"), {"heads", "neurons", "importance", "curves"}),
        (("circuit",), ("directions", "scores", "check", "evaluation", "replies"), {"importance", "drawn", "shared", "calibration"}),
        (("replies",), ("directions", "scores", "circuit", "evaluation"), set()),
    ],
)
def test_what_is_missing_is_named_with_its_command(
    tmp_path: Path, parts: tuple[str, ...], lost: tuple[str, ...], figures: set[str]
) -> None:
    places = write_all(tmp_path, parts)
    made = build_report(places, tmp_path / "page.html", MODEL)
    root = Reader(made.path.read_text(encoding="utf-8")).root
    assert list(made.missing) == [WHAT[name] for name in lost]
    assert {node.attributes["id"].removeprefix("fig-") for node in root.all("figure")} == figures
    box = next(node for node in root.all("div", class_="absent") if node.all("ul"))
    for name in lost:
        assert maker(name, MODEL) in box.text
    assert "Not evaluated yet" in root.text


def test_a_circuit_without_calibration_and_neurons(tmp_path: Path) -> None:
    places = write_all(tmp_path, ("circuit",), made=circuit("", neurons=False, calibrated=False))
    inputs = read_inputs(places, MODEL)
    assert [item.command for item in inputs.lacks("calibration")] == [f"emosteer calibrate --model {MODEL}"]
    root = built(places, tmp_path)
    assert "It has no neurons" in root.text and not [n for n in root.all("figure") if n.attributes["id"] == "fig-calibration"]


def test_nothing_at_all_is_an_error_that_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"found none; `emosteer extract --model toy/model-1`.*`emosteer evaluate"):
        build_report(Places.of(MODEL, tmp_path), tmp_path / "page.html", MODEL)
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "expected .* to be JSON"),
        ("[]", "expected .* to be an evaluation"),
        (json.dumps({"kind": "evaluation", "schema": 3}), "has schema 3"),
        (json.dumps({"kind": "evaluation", "schema": 1}), "made by an earlier version; run `emosteer evaluate` again"),
        (json.dumps({**evaluation(), "results": {}}), "expected 'results' .* to be a list, found dict"),
    ],
)
def test_a_damaged_evaluation_is_refused_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "evaluation.json"
    path.write_text(text)
    with pytest.raises(ArtifactError, match=said) as error:
        Measured.load(path)
    assert "emosteer evaluate" in str(error.value) and "\n" not in str(error.value)


def test_values_that_are_not_there_leave_dashes(tmp_path: Path) -> None:
    bare = {"value": None, "low": None, "high": None}
    rows = [{"method": "circuit", "n": 0, "missing": 9, "good": bare, "ratio": {"value": None}}]
    root = built(write_all(tmp_path, ("evaluation",), results=rows, frontier=[], comparisons=[], equal_ratio=None, chosen={}), tmp_path)
    assert "Nothing was measured" in figure(root, "outcome").text and root.all("table")[0].all("td")[0].text == "\u2013"


def test_a_contest_of_an_earlier_version_is_left_out_and_said_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old_rows = [{name: value for name, value in row.items() if name != "opinions"} for row in reply_rows(groups=1)]
    places = write_all(tmp_path, schema=1, replies=old_rows)
    inputs = read_inputs(places, MODEL)
    assert inputs.contest is None and not inputs.replies and inputs.circuit is not None
    assert [(item.what, item.why) for item in inputs.absent] == [(WHAT[kind], EARLIER) for kind in ("evaluation", "replies")]
    root = built(places, tmp_path)
    box = next(node for node in root.all("div", class_="absent") if node.all("ul"))
    assert EARLIER in box.text and maker("evaluation", MODEL) in box.text and "Not evaluated yet" in root.text
    assert "fig-outcome" not in {node.attributes["id"] for node in root.all("figure")} and figure(root, "heads")
    for name in ("contest", "parts", "panel", "topic", "replies"):
        assert EARLIER in next(node for node in root.all("section") if node.attributes["id"] == name).text, name
    with pytest.raises(SystemExit):
        cli.main(["report", "--model", MODEL, "--artifacts", str(tmp_path), "--out", str(tmp_path / "r.html")])
    assert f"not on the page: the evaluation ({EARLIER})\n" in capsys.readouterr().err


def test_an_old_contest_alone_is_refused_in_one_line(tmp_path: Path) -> None:
    path = Places.of(MODEL, tmp_path).folder / "evaluation" / "evaluation.json"
    write_text(path, json.dumps({**evaluation(), "schema": 1}))
    with pytest.raises(ArtifactError, match="expected .* to have schema 2, found 1: made by an earlier version") as error:
        read_inputs(Places.of(MODEL, tmp_path), MODEL)
    assert "\n" not in str(error.value)


# ---- artefacts that do not belong together ---------------------------------------------------------------------------------------


def test_other_parents_and_weights_are_warned_of(tmp_path: Path) -> None:
    assert not read_inputs(whole_page()[0]).warnings
    places = write_all(tmp_path, made=circuit("9" * 64), circuit_sha256="8" * 64, model_sha256="7" * 64)
    said = "\n".join(read_inputs(places).warnings)
    assert "different model weights" in said and "evaluation 777777777777" in said
    assert "The circuit was made from other directions (999999999999)" in said and f"`emosteer circuit --model {MODEL}`" in said
    assert "The evaluation used another circuit (888888888888)" in said and "scores were" not in said


def test_a_circuit_calibrated_after_its_evaluation_is_the_same_circuit(tmp_path: Path) -> None:
    made = circuit("")
    made = replace(made, provenance=replace(made.provenance, parents={"circuit": "8" * 64}))
    assert not read_inputs(write_all(tmp_path, ("circuit", "evaluation"), made=made, circuit_sha256="8" * 64)).warnings


# ---- verdict -----------------------------------------------------------------------------------------------------------------------


def judge(*, check: dict[str, Any] | None = None, made: Circuit | None = None, **changes: Any) -> dict[str, Finding]:
    """The findings on a changed evaluation, by question; the headline under ""."""
    raw = {**evaluation(), **changes}
    found = verdict(Measured(raw, {row["method"]: row for row in raw["results"]}), made, check, MODEL)
    return {"": Finding(found.headline, found.lead, "", ""), **{f.question: f for f in found.findings}}


def with_circuit(**changes: Any) -> list[dict[str, Any]]:
    """Results in which the circuit's line is otherwise."""
    return [{**result(m), **(changes if m == "circuit" else {})} for m in TRUTH]


def test_the_verdict_of_a_good_evaluation() -> None:
    found = judge(comparisons=[*evaluation()["comparisons"], compared("circuit", "residual", "kept", by=0.05)])
    assert found[""].question == "The circuit works, and the text holds" and "83.0\u202f%" in found[""].answer
    assert (
        "Worst kind of prompt: question, 53.0\u202f%" in found[""].answer
        and "among 6 emotions without neutral: 92.0" in found["Does it work?"].detail
    )
    assert all(part in found["Does it work?"].detail for part in ("read in 88.0", "sound 97.5", "answers its prompt 92.0", "emotion 0.8"))
    assert found["For every kind of prompt?"].answer == "Yes" and "Worst: question, 53.0" in found["For every kind of prompt?"].detail
    assert found["Do the judges agree?"].tone == MIXED and "0.71" in found["Do the judges agree?"].detail
    assert (found["Does it work?"].answer, found["Does it work?"].tone) == ("Yes", GOOD)
    assert found["Better than asking for it in the prompt?"].answer == "Yes, by 28.0 points"
    assert "+24.0 points" in found["Better than asking for it in the prompt?"].detail
    assert found["Better than residual steering?"].tone == MIXED  # 2 points, interval over zero
    learned = found["Better than residual steering that is learned in the same way?"]
    assert (learned.tone, learned.answer) == (GOOD, "Yes, by 4.0 points") and "learned as the circuit's gains were" in learned.detail
    earlier = judge(results=[result(method) for method in TRUTH if method != "learned-residual"])
    assert "learned in the same way" not in " ".join(earlier), "an evaluation of before, or of a circuit that has none"
    assert found["Does it keep more of the content than residual steering?"].tone == GOOD
    assert found["Better than random interventions of the same size?"].answer == "Yes, though random heads also do something"
    assert found["Was everything judged?"].answer == "3 replies were not"


@pytest.mark.parametrize(
    ("changes", "question", "answer", "tone"),
    [
        (dict(results=with_circuit(good=around(0.05))), "Does it work?", "No", BAD),
        (dict(results=with_circuit(good=around(0.45))), "Does it work?", "In part", MIXED),
        (dict(results=with_circuit(good={"value": None})), "Does it work?", "Not measured", UNKNOWN),
        (dict(results=with_circuit(ratio=around(1.2))), "What does it cost the text?", "Too much: perplexity outside the budget", BAD),
        (dict(results=with_circuit(ratio=around(1.09))), "What does it cost the text?", "Little: within the budget, but", MIXED),
        (dict(results=with_circuit(names=around(0.3))), "What does it cost the text?", "Too much: naming outside", BAD),
        (dict(results=with_circuit(sound=around(0.8))), "What does it cost the text?", "Too much: soundness outside", BAD),
        (dict(comparisons=[compared("circuit", "residual", by=-0.1)]), "Better than residual steering?", "No, it is behind, by 10.0", BAD),
        (dict(comparisons=[compared("residual", "circuit", by=-0.1)]), "Better than residual steering?", "Yes, by 10.0 points", GOOD),
        (dict(comparisons=[]), "Better than asking for it in the prompt?", "Yes", GOOD),
        (dict(best_prompt=None), "Better than asking for it in the prompt?", "Not compared", UNKNOWN),
        (dict(results=with_circuit(by_emotion={"fear": {"good": around(0.1, 0.1)}})), "For every emotion?", "Not shown for fear", BAD),
        (dict(results=with_circuit(by_emotion={"fear": {"good": around(0.4)}})), "For every emotion?", "Above the unsteered model for all", MIXED),  # noqa: E501
        (dict(results=with_circuit(by_kind={"chat": {"good": around(0.01)}}, worst_kind="chat")), "For every kind of prompt?", "Not shown for chat", BAD),  # noqa: E501
        (dict(results=with_circuit(by_kind={"sev-plain": {"good": around(0.4)}}, worst_kind="sev-plain")), "For every kind of prompt?", "Above the unsteered model for all, but below one half for plain event", MIXED),  # noqa: E501
        (dict(agreement={**agreement(), "alpha": 0.85}), "Do the judges agree?", "Yes", GOOD),
        (dict(agreement={**agreement(), "alpha": 0.4}), "Do the judges agree?", "Too little", BAD),
        (dict(comparisons=[compared("circuit", "random-heads", by=0.01)]), "Better than random interventions of the same size?", "Not shown against random heads", BAD),  # noqa: E501
    ],
)  # fmt: skip
def test_the_verdict_follows_the_numbers(changes: dict[str, Any], question: str, answer: str, tone: str) -> None:
    found = judge(**changes)[question]
    assert found.answer.startswith(answer) and found.tone == tone


def test_headlines_say_what_fails() -> None:
    assert judge(results=with_circuit(good=around(0.03)))[""].question == "The circuit does not steer this model"
    assert judge(results=with_circuit(ratio=around(1.5)))[""].question == "The circuit works, but the text pays for it"
    assert judge(results=[result("none")])[""].question == "The circuit was not evaluated"


def test_the_dial_is_judged_by_other_prompts_where_there_are_any() -> None:
    question = "Does more intensity read as more emotion?"
    made, check = circuit(""), dial_check()
    assert judge(made=made)[question].tone == MIXED and "fitted on" in judge(made=made)[question].detail
    assert judge(made=made, check=check)[question].tone == GOOD and "1.15" in judge(made=made, check=check)[question].detail
    check["emotions"] = {**check["emotions"], "fear": {**check["emotions"]["fear"], "judged": [0.1, 0.3, 0.2, 0.65, 0.8]}}
    assert judge(made=made, check=check)[question].answer == "Not at every step for fear"
    assert calibration()["emotions"]["fear"]["judged"] == sorted(calibration()["emotions"]["fear"]["judged"])


def test_emotions_without_a_dial_are_no_evidence_of_one() -> None:
    question = "Does more intensity read as more emotion?"
    made, check = circuit(""), dial_check()
    curves = made.metrics["calibration"]["emotions"]
    curves["disgust"] = {**curves["disgust"], "strength": [0.0], "judged": [0.1], "fitted": [0.1], "ratio": [1.0]}
    found = judge(made=made)[question]
    assert (found.answer, found.tone) == ("Yes, at every step for 5 emotions; no dial for disgust", MIXED)
    curves["fear"] = {**curves["fear"], "judged": [0.1, 0.3, 0.2, 0.65, 0.8]}
    assert judge(made=made)[question].answer == "Not at every step for fear; no dial for disgust"
    del check["emotions"]["disgust"]
    found = judge(made=made, check={**check, "without_dial": ["disgust"]})[question]
    assert (found.answer, found.tone) == ("Yes, at every step for 5 emotions; no dial for disgust", MIXED), "a check names them apart"
    found = judge(made=made, check={**check, "emotions": {}, "without_dial": list(EMOTIONS)})[question]
    assert (found.answer, found.tone) == ("No emotion has a dial", MIXED)


# ---- pieces ---------------------------------------------------------------------------------------------------------------------------


def test_slim_drops_everything_that_could_load_run_or_clash() -> None:
    text = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="10.4" height="5" viewBox="0 0 10 5">'
        '<defs><clipPath id="clip0"><rect width="1" height="1"/></clipPath></defs><script>x()</script><image xlink:href="http://e.invalid/"/>'
        '<a href="javascript:x()"><text>linked</text></a><g id="a" onclick="x()" clip-path="url(#clip0)" opacity="1">'
        '<path d="M0,0h1.23456v1" aria-label="\u00a7a &lt;tip&gt;" fill="var(--ink)"/>'
        '<path d="M0,0L1,1" aria-label="x: 1" stroke="red"/></g>'
        '<g><path class="background" d="M0,0h9v9h-9Z"/></g><text x="1">a &amp; b</text></svg>'
    )
    assert slim(text, 'what "it" shows') == (
        '<svg class="plot" role="img" aria-label="what &quot;it&quot; shows" viewBox="0 0 10 5" width="10" height="5" '
        'style="max-width:12px"><g><path d="M0,0h1.23v1" fill="var(--ink)"><title>a &lt;tip&gt;</title></path>'
        '<path d="M0,0L1,1" stroke="red" /></g><text x="1">a &amp; b</text></svg>'
    )


#: How the two common colour blindnesses see linear RGB (Machado, Oliveira and Fernandes 2009, full severity), and eyes that see all.
EYES = {
    "all colours": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "no red": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "no green": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.01182, 0.04294, 0.968881)),
}


def seen_as(colour: str, eyes: tuple[tuple[float, ...], ...]) -> tuple[float, float, float]:
    """A hex colour in CIELAB, as some eyes see it."""
    srgb = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in srgb]
    r, g, b = (min(1.0, max(0.0, sum(m * c for m, c in zip(row, linear, strict=True)))) for row in eyes)
    xyz = (
        (0.4124 * r + 0.3576 * g + 0.1805 * b) / 0.95047,
        0.2126 * r + 0.7152 * g + 0.0722 * b,
        (0.0193 * r + 0.1192 * g + 0.9505 * b) / 1.08883,
    )
    x, y, z = (v ** (1 / 3) if v > 0.008856 else 7.787 * v + 16 / 116 for v in xyz)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


@pytest.mark.parametrize("eyes", EYES)
def test_methods_are_told_apart_by_the_colour_blind_too(eyes: str) -> None:
    """Distances in CIELAB: 2.3 is just noticeable, 20 is plain. Shapes and dashes tell methods apart besides."""
    style = (Path(page.__file__).parent / "style.css").read_text(encoding="utf-8")
    names = re.findall(r"--(m-\w+|series-\d): #(\w{6})", style)
    assert len(names) == 2 * 13
    for theme in (dict(names[: len(names) // 2]), dict(names[len(names) // 2 :])):
        for some in ([n for n in theme if n.startswith("m-")], [n for n in theme if n.startswith("series")]):
            for a, b in itertools.combinations(some, 2):
                assert math.dist(seen_as(theme[a], EYES[eyes]), seen_as(theme[b], EYES[eyes])) > 20, f"{a} and {b}"


def test_every_colour_of_the_page_is_defined_in_both_themes() -> None:
    assert not undefined_colours(whole_page()[1].path.read_text(encoding="utf-8"))


def test_colour_steps_cover_every_value_once() -> None:
    steps = Steps.diverging(2.0)
    assert [steps.step(v) for v in (-9, -1.31, -1.3, -0.1, 0.0, 0.0999, 0.1, 1.3, 9)] == [0, 0, 1, 4, 4, 4, 5, 8, 8]
    assert [key.text for key in Steps.sequential(1.0, 2).key()] == ["below 0.50", "0.50 or more"]
    assert all(len(s.key()) == len(s.paints) == len(s.edges) + 1 for s in (steps, Steps.sequential(3.0)))


ALIKE = ("anger", "disappointment", "disapproval", "fear")


def test_columns_are_cut_only_as_far_as_they_still_differ() -> None:
    assert list(shortened(ALIKE).values()) == ["anger", "disappo.", "disappr.", "fear"]
    assert list(shortened((*EMOTIONS, "neutral")).values())[-1] == "neut." and shortened(["disappointment"]) == {"disappointment": "disa."}
    assert shortened(["surprise", "surprised"]) == {"surprise": "surprise", "surprised": "surpri."}


def test_emotions_whose_names_begin_alike_keep_their_own_columns() -> None:
    values = [[round(0.1 * (i + j), 1) for j in range(4)] for i in range(4)]
    drawn = square(ALIKE, values, Steps.sequential(1.0), "Alike")[0].svg
    contest = Measured(evaluation(), {"circuit": {**result("circuit"), "confusion": {a: dict.fromkeys(ALIKE, 0.25) for a in ALIKE}}})
    confusion = contest_figures._confusion_panel(contest, "circuit", Steps.sequential(1.0)).svg
    for svg in (drawn, confusion):
        places = {match for match in re.findall(r'd="M([\d.]+),[\d.]+h', svg)}
        assert ">disappo.</text>" in svg and ">disappr.</text>" in svg and len(places) == len(ALIKE)


def test_numbers_read_well() -> None:
    assert number(-0.001) == "0.00" and number(-1234.5, 1) == "\u22121,234.5" and number(None) == number(float("nan")) == "\u2013"
    assert percent_range(Interval(0.5)) == "50.0\u202f%" and percent_range(Interval(0.5, 0.4, 0.6)) == "50.0\u202f%\u00a0[40.0,\u00a060.0]"
    assert points_range(Interval(-0.02, -0.05, 0.01)) == "\u22122.0 points\u00a0[\u22125.0,\u00a0+1.0]"
    assert words(["a"]) == "a" and words(["a", "b", "c"]) == "a, b and c" and plural(1, "head") == "1 head"
    assert Interval.of({"value": True, "low": "x", "high": float("inf")}) == Interval(None, None, None)


def test_commands_are_ones_that_the_command_line_takes() -> None:
    """Every command on a page is parsed by the real command line."""
    places, _ = whole_page()
    inputs = read_inputs(places, MODEL)
    texts = [maker(kind, MODEL) for kind in WHAT]
    assert inputs.directions and inputs.scores and inputs.circuit
    odd = replace(inputs.directions, elicitation="tone", instruction="Be 'brief'.", emotions=("joy", "fear"))
    curve = {"shares": [0.1], "neuron_shares": [], "kinds": ["mean"], "n_random": 5, "n_prompts": 8, "strength": 3.0}
    scored = replace(inputs.scores, provenance=replace(inputs.scores.provenance, params={"curves": curve, "true_units": 4}, seed=3))
    texts += [made_by("directions", odd, MODEL), made_by("scores", scored, MODEL)]
    texts += made_by("circuit", inputs.circuit, MODEL).split(" && ")
    assert (
        "--instruction 'Be '\"'\"'brief'\"'\"'.'" in texts[-4] and "--shares 0.1 --neuron-shares '' --kinds mean --randoms 5" in texts[-3]
    )
    group = typer.main.get_command(cli.app)
    for text in texts:
        program, stage, *arguments = shlex.split(text)
        assert program == "emosteer"
        context = group.commands[stage].make_context(stage, arguments)  # type: ignore[attr-defined]
        assert context.params["model"] == MODEL


def test_a_very_large_model_gets_one_head_map_and_its_best_heads() -> None:
    places, _ = whole_page()
    inputs = read_inputs(places)
    assert inputs.scores
    heads = torch.zeros(6, 60, 40)
    heads[2, 59, 7] = 5.0
    large = replace(inputs.scores.forms["contrast"], heads=heads)
    scores = replace(inputs.scores, forms={"contrast": large}, importance=torch.zeros(6, 4, 2), curves=[])
    only = replace(inputs, scores=scores, circuit=None, directions=None, contest=None, check=None)
    shown = next(figure for section in sections(only) for figure in section.figures if figure.id == "heads")
    assert len(shown.panels) == 1 and "L59H7 5.00" in shown.panels[0].alt and len(shown.tables[0].rows) == 600


def test_the_command_writes_the_page_and_says_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_all(tmp_path, ("replies",))
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    with pytest.raises(SystemExit) as done:
        cli.main(["report", "--model", MODEL, "--artifacts", str(tmp_path), "--out", str(tmp_path / "r.html"), "--json", "--open"])
    out, err = capsys.readouterr()
    said = json.loads(out)
    assert done.value.code == 0 and said["file"] == str(tmp_path / "r.html") and said["bytes"] == (tmp_path / "r.html").stat().st_size
    assert said["replies"] == 330 and WHAT["evaluation"] in said["missing"] and "not on the page: the evaluation" in err
    assert opened == [(tmp_path / "r.html").as_uri()]
    with pytest.raises(SystemExit) as done:
        cli.main(["report", "--model", "nobody", "--artifacts", str(tmp_path)])
    assert done.value.code == 1 and "emosteer extract --model nobody" in capsys.readouterr().err


def test_commands_in_prose_are_set_as_code_and_nothing_else_is_markup() -> None:
    assert commands("made `a <b>` & `c`, not `d") == "made <code>a &lt;b&gt;</code> &amp; <code>c</code>, not `d"
