"""A point of valence, arousal and dominance -> the mixture of a circuit's emotions that lies nearest to it. Plain numbers, no torch.

An emotion at `moods.FULL` stands at its place (`scenarios.taxonomies`), at half of that half way from neutral, and what is mixed adds up.
What can be reached is therefore the hull of the emotions' places and neutral, as far as the dial goes (`dial.MOST_TOGETHER` in all). The
mixture nearest to a point is a least-squares problem with few unknowns, and one of its solutions has at most three emotions, four where
the dial's end is reached (Caratheodory): they are all tried. Of mixtures that reach the same place the weakest is taken, since
steering costs sense.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from emosteer.base.errors import UsageError
from emosteer.circuits.arcs import Mixture
from emosteer.circuits.dial import MOST_TOGETHER
from emosteer.circuits.moods import FULL
from emosteer.scenarios.taxonomies import AXES, Place, place_of

#: Distances that count as none; the axes reach from -1 to 1, and intensities are kept to a tenth.
NEAR = 0.02
#: The sum of the shares of an emotion at `FULL` that a mixture may have.
_CAP = MOST_TOGETHER / FULL
_SAME = 1e-9


@dataclass(frozen=True)
class Reached:
    """The nearest mixture. place: where it stands; distance: from the point that was asked for."""

    mixture: Mixture
    place: Place
    distance: float

    @property
    def there(self) -> bool:
        """Whether it is the point that was asked for."""
        return self.distance <= NEAR


def parse_point(value: str | Sequence[float]) -> Place:
    """Reads "0.2,0.9,0.3", or three numbers: valence, arousal and dominance, each -1 to 1.

    Raises:
        UsageError: for another number of them, or one outside.
    """
    parts: Sequence[str | float] = value.split(",") if isinstance(value, str) else value
    try:
        numbers = tuple(float(part) for part in parts)
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) != len(AXES) or not all(-1 <= number <= 1 for number in numbers):
        shown = value if isinstance(value, str) else ",".join(map(str, value))
        raise UsageError(f"expected {', '.join(AXES)} as three numbers from -1 to 1, such as 0.2,0.9,0.3, found '{shown[:60]}'")
    valence, arousal, dominance = numbers
    return valence, arousal, dominance


def mixture_at(point: Place, emotions: Sequence[str]) -> Reached:
    """The mixture of some emotions that lies nearest to a point; those without a place are passed over.

    Args:
        point: valence, arousal and dominance; emotions: that a circuit knows.

    Raises:
        UsageError: if none of the emotions has a place.
    """
    placed = {emotion: place for emotion in emotions if (place := place_of(emotion)) is not None}
    if not placed:
        raise UsageError(f"none of {', '.join(emotions)} has a known valence, arousal and dominance; ask for emotions by name")
    names, best, score = tuple(placed), {}, (math.inf, math.inf)
    for shares in _candidates(point, list(placed.values())):
        found = {names[index]: share for index, share in shares.items()}
        distance = math.dist(point, _place(found, placed))
        if distance < score[0] - _SAME or (distance < score[0] + _SAME and sum(found.values()) < score[1] - _SAME):
            best, score = found, (distance, sum(found.values()))
    mixture = Mixture.of({name: round(FULL * share, 1) for name, share in best.items()}).within
    place = _place({name: value / FULL for name, value in mixture.intensities.items()}, placed)
    return Reached(mixture, place, math.dist(point, place))


def _place(shares: dict[str, float], placed: dict[str, Place]) -> Place:
    valence, arousal, dominance = (sum(share * placed[name][axis] for name, share in shares.items()) for axis in range(len(AXES)))
    return valence, arousal, dominance


def _candidates(point: Place, places: Sequence[Place]) -> Iterator[dict[int, float]]:
    """Every basic solution: place -> share. Nothing at all; up to three places free; up to four that add up to the dial's end."""
    yield {}
    gram = [[sum(a * b for a, b in zip(one, other, strict=True)) for other in places] for one in places]
    right = [sum(a * b for a, b in zip(one, point, strict=True)) for one in places]
    for size in range(1, min(4, len(places)) + 1):
        for chosen in itertools.combinations(range(len(places)), size):
            rows = [[gram[i][j] for j in chosen] for i in chosen]
            if size < 4:
                yield from _allowed(chosen, _solved(rows, [right[i] for i in chosen]))
            bordered = [*([*row, 1.0] for row in rows), [*[1.0] * size, 0.0]]  # with the multiplier of the sum
            yield from _allowed(chosen, _solved(bordered, [*(right[i] for i in chosen), _CAP]))


def _allowed(chosen: Sequence[int], found: Sequence[float] | None) -> Iterator[dict[int, float]]:
    shares = None if found is None else found[: len(chosen)]
    if shares is not None and min(shares) >= -_SAME and sum(shares) <= _CAP + _SAME:
        yield {index: max(0.0, share) for index, share in zip(chosen, shares, strict=True)}


def _solved(rows: Sequence[Sequence[float]], right: Sequence[float]) -> list[float] | None:
    """The solution of a small linear system by elimination with pivots, None where it has none or many."""
    table = [[*row, value] for row, value in zip(rows, right, strict=True)]
    n = len(table)
    for column in range(n):
        pivot = max(range(column, n), key=lambda row: abs(table[row][column]))
        if abs(table[pivot][column]) < _SAME:
            return None
        table[column], table[pivot] = table[pivot], table[column]
        for row in range(n):
            if row != column and (factor := table[row][column] / table[column][column]):
                table[row] = [a - factor * b for a, b in zip(table[row], table[column], strict=True)]
    return [table[row][n] / table[row][row] for row in range(n)]
