"""Do replies written at a point of valence, arousal and dominance read like that point? `emosteer generate --vad` against a judge.

    python bench/points.py                     # 8 points x 12 development prompts, some two minutes on one core
    python bench/points.py --reach             # how much of the cube the sets' emotions reach, without a model

For every axis the correlation, over replies, of what was asked for with where the judge's reading stands (the mean of the emotions' places,
weighted by how likely the judge finds each), the same against where the nearest mixture stands, and beside it the share of random deals of
the points among the replies that do as well. The judge and the mixture use the same table of places, so that agreement shows that the
emotions arrive and not that the table is right.
"""

from __future__ import annotations

import argparse
import json
import random

import torch

import emosteer
from emosteer.base.tables import print_table
from emosteer.circuits.points import mixture_at
from emosteer.judges.reader import Reader
from emosteer.scenarios.emotions import parse_emotions
from emosteer.scenarios.shipped import development_groups
from emosteer.scenarios.taxonomies import AXES, place_of

#: Corners that the six emotions' hull comes near or not, and the centre.
POINTS = (
    (0.8, 0.5, 0.4),
    (0.4, 0.7, -0.1),
    (-0.5, 0.6, 0.2),
    (-0.6, 0.6, -0.4),
    (-0.6, -0.3, -0.3),
    (0.2, 0.9, 0.3),
    (0.6, -0.6, 0.2),
    (0.0, 0.0, 0.0),
)
DEALS = 2000


def main() -> None:
    """Writes, reads and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--out", help="JSON lines of the replies", metavar="FILE")
    parser.add_argument("--reach", action="store_true", help="no replies: which share of random points can be reached")
    chosen = parser.parse_args()
    if chosen.reach:
        return reach()
    m, read = emosteer.load(), Reader()
    said = [
        [*(turn._asdict() for turn in g.earlier), {"role": "user", "content": g.text}] for g in development_groups(chosen.prompts).groups
    ]
    rows = []
    for point in POINTS:
        reached = mixture_at(point, m.emotions)
        replies = m.generate(said, vad=point, max_new_tokens=48)  # type: ignore[call-overload]
        for conversation, reply, shares in zip(said, replies, read.shares([reply.text for reply in replies]), strict=True):
            seen = [sum(share * place[i] for e, share in shares.items() if (place := place_of(e)) is not None) for i in range(len(AXES))]
            asked = {"point": point, "reached": reached.place, "mixture": reached.mixture.label, "seen": seen}
            rows.append({**asked, "prompt": conversation[-1]["content"], "text": reply.text})
    if chosen.out:
        with open(chosen.out, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    report(rows)


def reach() -> None:
    """Of random points of the cube, how many each set's emotions reach, and how far off the nearest mixture is."""
    draw = random.Random(0)
    points = [(draw.uniform(-1, 1), draw.uniform(-1, 1), draw.uniform(-1, 1)) for _ in range(1000)]
    table = []
    for name in ("ekman6", "plutchik8", "parrott:primary"):
        found = [mixture_at(point, parse_emotions(name, closed=False)) for point in points]
        far = sorted(one.distance for one in found)
        table.append([name, f"{sum(one.there for one in found) / len(found):.1%}", f"{far[len(far) // 2]:.2f}"])
    print_table(("emotions", "reached", "median distance"), table, f"{len(points)} random points")


def report(rows: list[dict[str, object]]) -> None:
    """The tables."""
    point, reached, seen = (torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in ("point", "reached", "seen"))
    table = []
    for at in dict.fromkeys(map(tuple, point.tolist())):
        mine = (point == torch.tensor(at, dtype=torch.float64)).all(1)
        first = rows[int(mine.nonzero()[0])]
        where = [",".join(f"{value:.2f}" for value in place) for place in (at, reached[mine][0].tolist(), seen[mine].mean(0).tolist())]
        table.append([where[0], first["mixture"], *where[1:]])
    print_table(("asked for", "mixture", "reached", "read, mean"), table, f"{len(rows)} replies")
    draw = torch.Generator().manual_seed(0)
    orders = torch.rand(DEALS, len(rows), generator=draw).argsort(1)
    cells = []
    for axis, name in enumerate(AXES):
        found = [correlation(place[:, axis], seen[:, axis]) for place in (point, reached)]
        dealt = correlation(reached[orders][..., axis], seen[:, axis])
        p = (1 + int((dealt >= found[1]).sum())) / (1 + DEALS)
        cells.append([name, f"{found[0]:.2f}", f"{found[1]:.2f}", f"{dealt.mean():.2f}", f"{p:.4f}"])
    print_table(
        ("", "with the point", "with the mixture's place", "dealt at random", "p"), cells, "correlation with what is read, over replies"
    )


def correlation(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Pearson's, over the last dimension."""
    left, right = (torch.nn.functional.normalize(x - x.mean(-1, keepdim=True), dim=-1) for x in (a, b))
    return (left * right).sum(-1)


if __name__ == "__main__":
    main()
