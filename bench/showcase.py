"""What the documents show of replies, made again from the model: docs/demo.svg, docs/GALLERY.md
and docs/methods.svg.

    python -m bench.showcase

The picture is what `make demo` prints for its first six prompts, one per emotion. The gallery's prompts are drawn at random from the test
prompts, and the emotions take turns: nothing is chosen by its replies.
"""

from __future__ import annotations

import io
import itertools
import random
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.terminal_theme import TerminalTheme

import emosteer
from emosteer.api.pairs import in_turn, pairs_of
from emosteer.api.steered_model import SteeredModel
from emosteer.base.files import write_text
from emosteer.base.jsonl import KeyedLog
from emosteer.cli import demo
from emosteer.judges.jury import Jury, make_jury
from emosteer.judges.pairs import Marked, Pair, tally
from emosteer.judges.registry import PANEL
from emosteer.report import plots
from emosteer.report.contest_figures import style
from emosteer.report.page import stylesheet
from emosteer.report.wording import label
from emosteer.scenarios.scenarios import Group
from emosteer.scenarios.shipped import unseen_groups

DOCS = Path(__file__).parents[1] / "docs"
#: Prompts in the gallery, and the seed of the draw.
DRAWN, SEED = 24, 0
#: The figure's axes, in %: answers, emotion. And how a point's name is set beside it.
AXES = ((25, 75), (0, 100))
BESIDE: Mapping[str, Mapping[str, Any]] = {
    "above": {"dy": -12},
    "right": {"dx": 9, "align": "left", "baseline": "middle"},
    "left": {"dx": -9, "align": "right", "baseline": "middle"},
    "below": {"dy": 16},
}
#: The terminal of the picture: every colour, dimmed text included, has a contrast of at least 4.5 to its background.
TERMINAL = TerminalTheme(
    (22, 27, 34),
    (230, 234, 239),
    [(22, 27, 34), (255, 123, 114), (126, 201, 110), (233, 196, 86), (121, 178, 240), (214, 150, 235), (108, 200, 214), (230, 234, 239)],
)


def main() -> None:
    """Writes all."""
    write_text(DOCS / "methods.svg", figure((DOCS / "RESULTS.md").read_text("utf-8")))
    with tempfile.TemporaryDirectory() as folder:
        model, jury = emosteer.load(artifacts=folder), make_jury(PANEL)(KeyedLog(Path(folder) / "opinions.jsonl"))
        write_text(DOCS / "demo.svg", picture(model, jury))
        write_text(DOCS / "GALLERY.md", gallery(pairs_of(model, jury, in_turn(draw(), model.emotions), demo.TOKENS)))
    print(f"wrote demo.svg, methods.svg and GALLERY.md in {DOCS}")


def picture(model: SteeredModel, jury: Jury) -> str:
    """A terminal in which the demo has begun, as SVG that loads nothing."""
    console = Console(record=True, width=demo.WIDTH, file=io.StringIO(), highlight=False)
    console.print(demo.title(model))
    demo.written(model, jury, demo.drawn_prompts(), console.print, len(model.emotions))
    console.print()
    return re.sub(r"@font-face\s*{.*?}", "", console.export_svg(title="make demo", theme=TERMINAL, unique_id="demo"), flags=re.DOTALL)


def figure(table: str) -> str:
    """The contest's methods, how many replies carry the emotion against how many answer their prompt, as SVG for light and dark pages.

    Args:
        table: the text of docs/RESULTS.md, whose first table holds both.
    """
    lines = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")]
    head, rows = lines[0], list(itertools.takewhile(lambda row: len(row) == len(lines[0]), lines[2:]))
    at = {name: head.index(name) for name in ("method", "emotion (panel)", "answers")}
    points = [{"name": row[at["method"]], **{name: float(row[at[name]].split()[0]) for name in list(at)[1:]}} for row in rows]
    points = [{**point, "series": label(point["name"]), "x": point["answers"], "y": point["emotion (panel)"]} for point in points]
    styles = {point["series"]: style(point["name"]) for point in points}
    place = {
        "x": plots.quantity("x", "replies that answer their prompt, %", domain=AXES[0]),
        "y": plots.quantity("y", "replies that carry the emotion, %", domain=AXES[1]),
    }
    dot = {**place, "color": plots.named("series", styles), "shape": plots.named("series", styles, "shape")}
    text = {**place, "text": {"field": "series", "type": "nominal"}}
    layers = [plots.mark("point", dot, size=90, filled=True, opacity=1)]
    for where, look in BESIDE.items():
        own = [point for point, chosen in zip(points, labelled(points), strict=True) if chosen == where]
        layers += [plots.mark("text", text, own, fontSize=12, **look)] * bool(own)
    alt_text = "; ".join(f"{p['series']}: emotion {p['y']:.0f} %, answers {p['x']:.0f} %" for p in points)
    return standalone(plots.svg(plots.chart(points, layers, 320, plots.WIDE), alt_text))


def labelled(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where each point's name stands (`BESIDE`): the first place that is inside the axes and meets no other name and no other point."""
    taken = [box(point) for point in points]
    chosen = []
    for i, point in enumerate(points):
        others = [other for j, other in enumerate(taken) if j != i]
        boxes = {where: box(point, where) for where in BESIDE}
        free = [where for where, own in boxes.items() if own[1] >= 0 and not any(meet(own, other) for other in others)]
        chosen.append(free[0] if free else next(iter(BESIDE)))
        taken.append(boxes[chosen[-1]])
    return chosen


def box(point: Mapping[str, Any], where: str | None = None) -> tuple[float, float, float, float]:
    """Left, low, right and high end of a point's name, or of the point itself, in pixels of the drawing, about."""
    (left, right), (low, high) = AXES
    x, y = 710 * (point["x"] - left) / (right - left), 270 * (point["y"] - low) / (high - low)
    width = 7 * len(point["series"])
    return {
        None: (x - 7, y - 7, x + 7, y + 7),
        "above": (x - width / 2, y + 5, x + width / 2, y + 19),
        "right": (x + 9, y - 7, x + 9 + width, y + 7),
        "left": (x - 9 - width, y - 7, x - 9, y + 7),
        "below": (x - width / 2, y - 19, x + width / 2, y - 5),
    }[where]


def meet(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether two boxes overlap."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def standalone(drawn: str) -> str:
    """A chart of the report as a file of its own, with the report's colours for light and dark pages."""
    paints = "".join(re.findall(r"^(?::root|@media screen and).*?^}", stylesheet(), re.DOTALL | re.MULTILINE))
    paper = '<rect width="100%" height="100%" fill="var(--paper)"/>'
    begin, rest = drawn.split(">", 1)
    return f'{begin} xmlns="http://www.w3.org/2000/svg" font-family="sans-serif"><style>{paints}</style>{paper}{rest}\n'


def draw() -> list[Group]:
    """Prompts of the test sets at random, as many of each kind, in random order."""
    chance, known = random.Random(SEED), unseen_groups(0).groups
    kinds = list(dict.fromkeys(group.kind for group in known))
    drawn = [group for kind in kinds for group in chance.sample([g for g in known if g.kind == kind], DRAWN // len(kinds))]
    return chance.sample(drawn, len(drawn))


def gallery(pairs: Sequence[Pair]) -> str:
    """The page."""
    plain, steered = tally(pairs, plain=True), tally(pairs)
    head = f"""# A gallery of replies, good and bad

Nothing here was chosen: {steered.total} of the test prompts were drawn at random, as many of each kind (seed {SEED}), and the six emotions
take turns. Each prompt was answered twice by the embedded model (SmolLM2-135M-Instruct): unsteered, and with the shipped circuit at its
default strength (greedy, guidance 1.5, at most {demo.TOKENS} new tokens). Below each reply stands what the panel of judges says of it. The
panel compares methods and says little about one reply ([JUDGES.md](JUDGES.md)), so read for yourself.

The panel reads the emotion asked for in {steered.read} of the {steered.total} steered replies (unsteered: {plain.read}). It finds
{steered.good} good (unsteered: {plain.good}): they also make sense, answer their prompt and do not name the emotion.

Made by `python -m bench.showcase`. A single reply comes from
`emosteer generate "PROMPT" --emotion EMOTION --max-new-tokens {demo.TOKENS}`, or with `--method none`. Written alone instead of in a batch,
it may differ where two tokens are about as likely.
"""
    return "\n".join([head, *(_entry(number, pair) for number, pair in enumerate(pairs, 1))])


def _entry(number: int, pair: Pair) -> str:
    said = "\n".join(f"> {'' if len(pair.turns) == 1 else f'*{turn.role}:* '}{_plain(turn.content)}  " for turn in pair.turns)
    lines = [f"## {number}. {pair.emotion.capitalize()} ({pair.kind})", said]
    lines += [
        f"**{name}.** {_plain(reply.text)}  \n*{_marks(reply)}*" for name, reply in (("Unsteered", pair.plain), ("Steered", pair.steered))
    ]
    return "\n\n".join(lines) + "\n"


def _plain(text: str) -> str:
    """A text on one line, its signs without a meaning in Markdown."""
    return re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", demo.one_paragraph(text))


def _marks(reply: Marked) -> str:
    words = [f"reads {reply.label or 'unread'}", "sound" if reply.sound else "not sound", "answers" if reply.answers else "does not answer"]
    return ", ".join(words + ["names the emotion"] * reply.names + ["good"] * reply.good)


if __name__ == "__main__":
    main()
