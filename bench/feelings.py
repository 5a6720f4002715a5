"""What mixtures, negative intensities and arcs do to replies, as the panel reads them.

    python bench/feelings.py                   # everything, some fifteen minutes on one core
    python bench/feelings.py --only mixtures   # or both, negative, arcs

Prints one row per amount: how likely the panel finds the emotions, how often its label is one of them, how many replies are sound.
Amounts beyond what the text bears are tried here, which no command gives. `both` asks whether a half-and-half mixture is read as both of
its emotions more often than either of them alone at the same intensity in all, pair by pair.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch

import emosteer
from emosteer.api.steered_model import SteeredModel
from emosteer.circuits.methods import Part
from emosteer.generation.decoding import Decoding
from emosteer.generation.generate import Reply, batches, generate
from emosteer.generation.steering import Course, SteeringPlan
from emosteer.judges.protocol import Opinion
from emosteer.judges.registry import PANEL, judge_of, make_judges
from emosteer.judges.soundness import SoundnessCheck
from emosteer.scenarios.prompts import INSTRUCTION
from emosteer.scenarios.scenarios import Group
from emosteer.scenarios.shipped import development_groups
from emosteer.writing.jobs import asked_request

DECODING = Decoding.usual(max_new_tokens=48)
#: A reply is read as both of two emotions where they are the panel's two likeliest labels, neutral counted, each this likely or more.
READ = 0.2
ARCS = (("two sentences, 24", 24, 64, INSTRUCTION), ("two sentences, 40", 40, 64, INSTRUCTION), ("free, 64", 64, 96, ""))


@dataclass(frozen=True)
class Trial:
    """Emotions with the intensities of the positive dial that they get, negative ones with the sign turned; asks: whether the prompt
    asks for the first of them."""

    row: str
    intensities: dict[str, float]
    asks: bool = False


def strengths(m: SteeredModel, intensities: dict[str, float]) -> list[float]:
    """Of each emotion, without the cap of mixtures."""
    assert m.circuit is not None
    given = [intensities.get(emotion, 0.0) for emotion in m.emotions]
    return [m.circuit.strength_at(e, abs(i)) * (1 if i >= 0 else -1) for e, i in zip(m.emotions, given, strict=True)]


def written(m: SteeredModel, trials: Sequence[Trial], groups: Sequence[Group]) -> list[tuple[Trial, Reply]]:
    """A reply to every prompt under every trial."""
    assert m.circuit is not None
    cells = [(trial, group) for trial in trials for group in groups]
    requests = [
        asked_request(m.model, str(g.key), "tone" if t.asks else None, g.text, next(iter(t.intensities)), INSTRUCTION, g.earlier, True)
        for t, g in cells
    ]
    vectors, replies = m.circuit.added(Part.UNITS, m.model), dict[int, Reply]()
    for index in batches(requests, 64):
        weights = torch.tensor([[strengths(m, cells[i][0].intensities)] for i in index])
        made = generate(m.model, [requests[i] for i in index], SteeringPlan.over(Course(vectors, weights)), DECODING)
        replies |= dict(zip(index, made, strict=True))
    return [(trial, replies[i]) for i, (trial, _) in enumerate(cells)]


def judged(texts: Sequence[str]) -> tuple[list[Opinion], list[bool]]:
    """What the panel reads, and whether each text is sound."""
    return judge_of(make_judges(PANEL)).opinions(texts), [one.sound for one in SoundnessCheck.load().check(texts)]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def report(found: Sequence[tuple[Trial, Reply]]) -> None:
    opinions, sound = judged([reply.text for _, reply in found])
    for row in dict.fromkeys(trial.row for trial, _ in found):
        at = [i for i, (trial, _) in enumerate(found) if trial.row == row]
        each = [sum((opinions[i].probabilities or {})[e] for e in found[i][0].intensities) for i in at]
        label = mean([opinions[i].emotion() in found[i][0].intensities for i in at])
        print(f"{row:<22} n {len(at):<4} P {mean(each):.2f}  label {label:.0%}  sound {mean([sound[i] for i in at]):.0%}", flush=True)


def is_both(opinion: Opinion, pair: Sequence[str]) -> bool:
    """Whether a reply is read as both of a pair of emotions."""
    shares = opinion.probabilities or {}
    likeliest = sorted(shares, key=lambda label: shares[label], reverse=True)[:2]
    return set(likeliest) == set(pair) and min(shares[label] for label in likeliest) >= READ


def both(m: SteeredModel, groups: Sequence[Group]) -> None:
    """Half-and-half mixtures beside either of their emotions alone."""
    pairs = list(combinations(m.emotions, 2))
    for total in (100.0, 70.0):
        trials = [Trial(e, {e: total}) for e in m.emotions] + [Trial(f"{a} + {b}", {a: total / 2, b: total / 2}) for a, b in pairs]
        found = written(m, trials, groups)
        opinions, sound = judged([reply.text for _, reply in found])
        at = {trial.row: [i for i, (other, _) in enumerate(found) if other.row == trial.row] for trial in trials}

        def share(row: str, pair: Sequence[str], at: dict[str, list[int]] = at, opinions: Sequence[Opinion] = opinions) -> float:
            return mean([is_both(opinions[i], pair) for i in at[row]])

        rows = [(share(f"{a} + {b}", (a, b)), share(a, (a, b)), share(b, (a, b))) for a, b in pairs]
        more = sum(mixed > max(first, last) for mixed, first, last in rows)
        alone = mean([max(first, last) for _, first, last in rows])
        kept = [mean([sound[i] for name, index in at.items() if ("+" in name) == mixed for i in index]) for mixed in (True, False)]
        print(f"{total:g} in all: read as both {mean([row[0] for row in rows]):.1%} of {len(pairs) * len(groups)} mixtures,", end=" ")
        print(f"{alone:.1%} of the better of the two alone; more often in {more} of {len(pairs)} pairs;", end=" ")
        print(f"sound {kept[0]:.0%} and {kept[1]:.0%}", flush=True)
        for (a, b), row in zip(pairs, rows, strict=True):
            p_a, p_b = (mean([(opinions[i].probabilities or {})[emotion] for i in at[f"{a} + {b}"]]) for emotion in (a, b))
            print(f"  {a + ' + ' + b:<22} both {row[0]:.0%}, alone {row[1]:.0%} and {row[2]:.0%}; P {p_a:.2f} {p_b:.2f}", flush=True)


def arcs(m: SteeredModel, groups: Sequence[Group]) -> None:
    """Thirds of replies, judged one by one."""
    pairs = [(m.emotions[i], m.emotions[(i + step) % 6]) for i in range(6) for step in (1, 3)]
    texts = [group.text for group in groups if not group.earlier][:8]
    for name, arc_tokens, longest, instruction in ARCS:
        rows: list[tuple[str, str, Reply]] = []
        for a, b in pairs:
            options = dict(arc_tokens=arc_tokens, max_new_tokens=longest, instruction=instruction)
            rows += [(a, b, reply) for reply in m.generate(texts, arc=f"{a}:75 -> {b}:75", **options)]  # type: ignore[call-overload]
        cuts = [[len(r.ids) * k // 3 for k in range(4)] for _, _, r in rows]
        parts = [m.tokenizer.decode(r.ids[c[k] : c[k + 1]]).strip() for (_, _, r), c in zip(rows, cuts, strict=True) for k in range(3)]
        opinions, _ = judged(parts)
        sound = judged([reply.text for _, _, reply in rows])[1]
        shares = [
            [mean([(opinions[3 * i + k].probabilities or {})[row[end]] for i, row in enumerate(rows)]) for k in range(3)] for end in (0, 1)
        ]
        tokens = mean([reply.n_tokens for _, _, reply in rows])
        thirds = "  ".join(" ".join(f"{share:.2f}" for share in each) for each in shares)
        print(f"{name:<22} n {len(rows):<4} tokens {tokens:.0f}  first, last by thirds: {thirds}  sound {mean(sound):.0%}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("mixtures", "both", "negative", "arcs"))
    parser.add_argument("--groups", type=int, default=6, help="development prompts; every kind has at least one")
    parser.add_argument("--every", type=int, default=1, help="take every so many of each kind, so that others are left")
    options = parser.parse_args()
    m = emosteer.load()
    groups = development_groups(options.groups).groups
    by_kind = [[group for group in groups if group.kind == kind] for kind in dict.fromkeys(group.kind for group in groups)]
    groups = [group for members in by_kind for group in members[:: options.every]]
    if options.only in (None, "mixtures"):
        trials = [Trial(f"one at {i}", {e: i}) for i in (50, 75, 100) for e in m.emotions]
        doses = (25, 37.5, 50, 75, 100)
        trials += [Trial(f"two at {i}", {a: i, b: i}) for i in doses for a, b in combinations(m.emotions, 2)]
        report(written(m, trials, groups))
    if options.only in (None, "both"):
        both(m, groups)
    if options.only in (None, "negative"):
        report(written(m, [Trial(f"asked, {i} of the dial", {e: i}, asks=True) for i in (0, -25, -50, -100) for e in m.emotions], groups))
    if options.only in (None, "arcs"):
        arcs(m, development_groups(16).groups)


if __name__ == "__main__":
    main()
