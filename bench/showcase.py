"""What the documents show of replies, made again from the model: docs/demo.svg and docs/GALLERY.md.

    python -m bench.showcase

The picture is what `make demo` prints for its first six prompts, one per emotion. The gallery's prompts are drawn at random from the test
prompts, and the emotions take turns: nothing is chosen by its replies.
"""

from __future__ import annotations

import io
import random
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

import emosteer
from emosteer.api.pairs import in_turn, pairs_of
from emosteer.api.steered_model import SteeredModel
from emosteer.base.files import write_text
from emosteer.base.jsonl import KeyedLog
from emosteer.cli import demo
from emosteer.judges.jury import Jury, make_jury
from emosteer.judges.pairs import Marked, Pair, tally
from emosteer.judges.registry import PANEL
from emosteer.scenarios.scenarios import Group
from emosteer.scenarios.shipped import unseen_groups

DOCS = Path(__file__).parents[1] / "docs"
#: Prompts in the gallery, and the seed of the draw.
DRAWN, SEED = 24, 0


def main() -> None:
    """Writes both."""
    with tempfile.TemporaryDirectory() as folder:
        model, jury = emosteer.load(artifacts=folder), make_jury(PANEL)(KeyedLog(Path(folder) / "opinions.jsonl"))
        write_text(DOCS / "demo.svg", picture(model, jury))
        write_text(DOCS / "GALLERY.md", gallery(pairs_of(model, jury, in_turn(draw(), model.emotions), demo.TOKENS)))
    print(f"wrote {DOCS / 'demo.svg'} and {DOCS / 'GALLERY.md'}")


def picture(model: SteeredModel, jury: Jury) -> str:
    """A terminal in which the demo has begun, as SVG that loads nothing."""
    console = Console(record=True, width=demo.WIDTH, file=io.StringIO(), highlight=False)
    console.print(demo.title(model))
    demo.written(model, jury, demo.drawn_prompts(), console.print, len(model.emotions))
    return re.sub(r"@font-face\s*{.*?}", "", console.export_svg(title="make demo", unique_id="demo"), flags=re.DOTALL)


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
