"""What `make demo` runs: the shipped circuit on twelve prompts beside the unsteered model, read by the panel, then a small extraction.

Nobody chose the prompts or who answers what: they are the first twelve of the project's fixed draw from the development prompts, in which
the kinds take turns, and so do the emotions.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from emosteer.base.progress import note
from emosteer.judges.pairs import Marked, Pair, tally

if TYPE_CHECKING:
    from emosteer.api.steered_model import SteeredModel
    from emosteer.directions.directions import Directions
    from emosteer.judges.jury import Jury
    from emosteer.scenarios import scenarios

#: How many prompts, and how many are written at a time, so that the first replies are soon there.
PROMPTS, AT_ONCE = 12, 4
#: Prompts of the small extraction, and the share that it is tested on; the shipped directions come from all 572.
GROUPS, HOLDOUT = 24, 0.25
TOKENS = 48
WIDTH = 100
#: Apart from `artifacts/MODEL`, where `generate` would prefer what lies there to what is shipped.
ROOT = Path("artifacts/demo")
#: A colour for each emotion, and for what is neither read nor wanted.
COLOURS = {"anger": "red", "sadness": "blue", "happiness": "yellow", "fear": "magenta", "surprise": "cyan", "disgust": "green"}
Say = Callable[[RenderableType], None]


def main() -> None:
    """Writes, reads and prints the pairs, extracts directions from a few prompts, and saves both as a page."""
    import emosteer
    from emosteer.base.jsonl import KeyedLog
    from emosteer.circuits.places import DEFAULT_MODEL
    from emosteer.judges.jury import make_jury
    from emosteer.judges.registry import PANEL

    warnings.simplefilter("ignore")  # of libraries; what the demo has to say it prints
    begin = time.monotonic()

    def step(message: str) -> None:
        note(f"[{time.monotonic() - begin:5.1f} s] {message}")

    say = stage(WIDTH).print
    step("loading the model and the judges (the model is fetched and converted once)")
    model, jury = emosteer.load(DEFAULT_MODEL, artifacts=ROOT), make_jury(PANEL)(KeyedLog(ROOT / "opinions.jsonl"))
    step(f"writing {2 * PROMPTS} replies, {2 * AT_ONCE} at a time")
    say(title(model))
    pairs = written(model, jury, drawn_prompts(), say)
    say(counted(pairs))
    step(f"extracting emotion directions from {GROUPS} prompts x 7 replies, as `emosteer extract` does from all")
    directions = extracted(model)
    say(evidence(directions))
    page = save_page(pairs, model, directions)
    step(f"done; the same with the circuit drawn: {page}")
    say(NEXT)


def drawn_prompts() -> list[scenarios.Group]:
    """The prompts: of each kind in turn, drawn as everywhere in this project."""
    from emosteer.scenarios.prompt_sets import KINDS, of_kinds, read_groups
    from emosteer.scenarios.scenarios import data_path

    found = read_groups(data_path("prompts/dev.jsonl"))
    kinds = [kind for kind in KINDS if any(group.kind == kind for group in found)]
    return of_kinds(found, kinds, PROMPTS + len(kinds))[:PROMPTS]


def written(model: SteeredModel, jury: Jury, groups: Sequence[scenarios.Group], say: Say, count: int = PROMPTS) -> list[Pair]:
    """Both replies to the first `count` prompts, printed as they come."""
    from emosteer.api.pairs import in_turn, pairs_of

    asked = in_turn(groups, model.emotions)
    pairs: list[Pair] = []
    for start in range(0, count, AT_ONCE):
        for pair in pairs_of(model, jury, asked[start : min(start + AT_ONCE, count)], TOKENS):
            pairs.append(pair)
            say(shown(pair, f"{len(pairs)}/{len(asked)}"))
    return pairs


def extracted(model: SteeredModel) -> Directions:
    """Directions from a few of the shipped prompts; written beside the page."""
    from emosteer.circuits.places import Places
    from emosteer.directions.extract import extract
    from emosteer.directions.settings import Settings
    from emosteer.scenarios.scenarios import EMOTIONS
    from emosteer.scenarios.shipped import read_data

    data = read_data(None, None, limit=GROUPS)
    made = extract(model.model, data.groups, Settings(EMOTIONS, holdout=HOLDOUT), bank=data.bank, data=data.hashes)
    made.save(Places.of(model.model.name, ROOT).directions)
    return made


def save_page(pairs: Sequence[Pair], model: SteeredModel, directions: Directions) -> Path:
    """demo.html."""
    from emosteer.base.files import write_text
    from emosteer.report.demo_page import demo_page

    assert model.circuit is not None
    page = ROOT / "demo.html"
    write_text(page, demo_page(pairs, model.circuit, [HOW, evidence(directions).plain.strip()]))
    return page


# ---- what is printed -------------------------------------------------------------------------------------------------------------

NEXT = "Next: [bold].venv/bin/emosteer generate 'Your text.' --emotion anger[/], or talk to it: [bold]make serve[/]"
HOW = "Prompts and emotions are drawn, not chosen. Judges see no target, and err: read for yourself."


def stage(width: int) -> Console:
    """A console on stdout that never writes wider than `width`."""
    console = Console(highlight=False)
    console.width = min(width, console.width) if console.is_terminal else width
    return console


def title(model: SteeredModel) -> RenderableType:
    """What is shown."""
    heads = 0 if model.circuit is None else int(model.circuit.heads.any(0).sum())
    line = Text(f"{model.model.name}: the same prompt, unsteered and with its emotion circuit ({heads} heads)", style="bold")
    return Group("", line, Text(HOW, style="dim"))


def shown(pair: Pair, number: str) -> RenderableType:
    """A prompt and both replies, side by side, what is read in each below it."""
    colour = COLOURS.get(pair.emotion, "white")
    asked = Text.assemble((f"{number:>5}  ", "dim"), (f"{pair.emotion:<10}", f"bold {colour}"), (pair.kind, "dim"))
    turns = [Text(f"{turn.role}: {turn.content}", style="dim") for turn in pair.turns[:-1]]
    grid = Table.grid(padding=(0, 2), expand=True)
    grid.add_column(ratio=1)
    grid.add_column(ratio=1)
    grid.add_row(Text("unsteered", style="dim"), Text(f"steered, strength {pair.strength:.2f}", style=colour))
    grid.add_row(Text(one_paragraph(pair.plain.text), style="dim"), Text(one_paragraph(pair.steered.text)))
    grid.add_row(marks(pair.plain, pair.emotion), marks(pair.steered, pair.emotion))
    return Group("", asked, Padding(Group(*turns, Text(f"> {pair.turns[-1].content}", style="bold"), grid), (0, 0, 0, 7)))


def marks(reply: Marked, emotion: str) -> Text:
    """What the judges say of a reply."""
    read = reply.label == emotion
    said = [(f"reads {reply.label or 'unread'}", f"bold {COLOURS.get(emotion, 'white')}" if read else "dim")]
    checks = (("sound", reply.sound), ("answers", reply.answers))
    said += [(f"{name} {'✓' if right else '✗'}", "green" if right else "red") for name, right in checks]
    said += [("names it", "red")] * reply.names
    return Text("  ").join(Text(words, style=style) for words, style in said)


def one_paragraph(text: str) -> str:
    """A reply without its line breaks."""
    return " ".join(text.split()) or "(nothing)"


def counted(pairs: Sequence[Pair]) -> RenderableType:
    """How many of the replies are right, by the panel."""
    steered, plain = tally(pairs), tally(pairs, plain=True)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("", "read as the emotion asked for", "good: also sound, answers its prompt, does not name it"):
        table.add_column(name, justify="right" if name else "left")
    for name, found in (("unsteered", plain), ("steered", steered)):
        table.add_row(name, f"{found.read} of {found.total}", f"{found.good} of {found.total}")
    return Group("", table, "")


def evidence(directions: Directions) -> Text:
    """Whether the new directions tell the emotion of prompts that they were not made from."""
    found, tested = directions.evidence, directions.n_heldout * len(directions.emotions)
    if found is None:
        return Text("Directions were extracted; too few prompts are held out to test them.\n")
    by_layer = [(site.layer, found.accuracy[i].mean().item()) for i, site in enumerate(directions.sites) if site.kind == "resid_post"]
    layer, best = max(by_layer, key=lambda item: item[1])
    mean = sum(share for _, share in by_layer) / len(by_layer)
    held = directions.n_heldout
    made, chance = directions.n_groups - held, 1 / len(directions.emotions)
    return Text(
        f"Directions from {made} prompts name the emotion of {tested} replies to {held} other prompts:\n"
        f"{mean:.0%} right on average over the layers, {best:.0%} in the best, layer {layer} (chance {chance:.0%}).\n"
    )


if __name__ == "__main__":
    from emosteer.cli.main import guarded

    guarded(main)
