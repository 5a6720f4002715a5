"""How directions lie to each other: whether they know valence, arousal and dominance, and whether parents lie among their children.

Nothing here touches a model. Each figure stands beside its null: the same figure with the emotions' places dealt out at random, or with
the children dealt to random parents. The p-values count the share of such deals that do as well (Phipson and Smyth 2010: the deal that was
found is one of them, so that none is 0).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from emosteer.base.errors import UsageError
from emosteer.base.seeds import torch_seed
from emosteer.directions.directions import Directions, band_mean, stable_band
from emosteer.models.sites import RESID_POST
from emosteer.scenarios.taxonomies import families_in, place_of

#: Random deals behind each p-value, and the fewest emotions that a map is drawn of: with four places there are only 24 deals.
DEALS = 2000
LEAST_EMOTIONS = 5
#: Components that a circumplex has.
PLANE = 2
#: Weight of the ridge penalty, in units of the directions' mean squared length from their mean. Fixed: with a handful of points nothing
#: could be chosen that the null would not have to choose again.
RIDGE = 1.0


@dataclass(frozen=True)
class Tested:
    """A figure and its null. null: its mean over random deals; p: share of the deals, itself among them, that are at least as good."""

    value: float
    null: float
    p: float


@dataclass(frozen=True)
class Circumplex:
    """The directions in the plane of their first two components.

    points: [emotion][component], in units of the directions; explained: share of the variance of each component; correlations: axis ->
    with each component; axes: axis -> the larger of the two, signs apart; distances: rank correlation of the directions' distances (1 less
    their cosine) with the distances of the places in valence and arousal.
    """

    emotions: tuple[str, ...]
    points: tuple[tuple[float, ...], ...]
    explained: tuple[float, ...]
    correlations: Mapping[str, tuple[float, ...]]
    axes: Mapping[str, Tested]
    distances: Tested


@dataclass(frozen=True)
class Family:
    """A parent and its children. cosine: of the parent's own direction with the mean of its children's; the null is random children."""

    parent: str
    children: tuple[str, ...]
    cosine: Tested


@dataclass(frozen=True)
class Tree:
    """Parents and children. cosine: mean of the families'; named: share of the children whose nearest parent is their own; the null of
    both deals the children to the parents at random."""

    families: tuple[Family, ...]
    cosine: Tested
    named: Tested


@dataclass(frozen=True)
class Geometry:
    """What is known of some directions. layers: that they were averaged over; circumplex, error: of the emotions that have a place, None
    where these are too few; error: axis, or "all" -> error of a linear map from directions to places, leaving one emotion out (root mean
    square); tree: None where no emotion is another's parent."""

    layers: tuple[int, ...]
    circumplex: Circumplex | None
    error: Mapping[str, Tested] | None
    tree: Tree | None


def geometry(directions: Directions, layers: Sequence[int] | None = None, deals: int = DEALS, seed: int = 0) -> Geometry:
    """Everything that is known of directions.

    Args:
        layers: that are averaged over; the stable band if not given; deals: random ones behind each p-value.

    Raises:
        UsageError: for layers that the model does not have. DegenerateDirection: if their directions cancel out.
    """
    band = tuple(layers) if layers is not None else stable_band(directions)
    return geometry_of(directions.at(RESID_POST), directions.emotions, band, deals, seed)


def geometry_of(vectors: Tensor, emotions: Sequence[str], layers: Sequence[int], deals: int = DEALS, seed: int = 0) -> Geometry:
    """The same of vectors. Shape [emotion, layer, d_model], of unit length; errors as `geometry`."""
    n_layers = vectors.shape[1]
    if not layers or not all(0 <= layer < n_layers for layer in layers):
        raise UsageError(f"expected layers from 0 to {n_layers - 1}, found {', '.join(map(str, layers)) or 'none'}")
    mean = band_mean(vectors, layers).double()
    placed = [index for index, emotion in enumerate(emotions) if place_of(emotion) is not None]
    names = tuple(emotions[index] for index in placed)
    enough = len(placed) >= LEAST_EMOTIONS
    families = families_in(emotions)
    return Geometry(
        layers=tuple(layers),
        circumplex=circumplex(mean[placed], names, deals, seed) if enough else None,
        error=map_error(mean[placed], places_of(names), deals, seed) if enough else None,
        tree=tree(mean, emotions, families, deals, seed) if len(families) > 1 else None,
    )


def places_of(emotions: Sequence[str]) -> Tensor:
    """Valence, arousal and dominance of emotions that have a place. Shape [emotion, 3]."""
    return torch.tensor([place_of(emotion) for emotion in emotions], dtype=torch.float64)


# ---- parents and children ------------------------------------------------------------------------------------------


def parent_direction(children: Tensor) -> Tensor:
    """A parent's direction from its children's: their mean, at unit length. Shape [child, d_model] -> [d_model]."""
    return torch.nn.functional.normalize(children.mean(0), dim=-1)


def nearest_parents(children: Tensor, parents: Tensor) -> Tensor:
    """The reverse: for each child the parent whose direction stands for it best. [child, d_model], [parent, d_model] -> [child]."""
    unit = torch.nn.functional.normalize(children, dim=-1) @ torch.nn.functional.normalize(parents, dim=-1).T
    return unit.argmax(1)


def tree(vectors: Tensor, emotions: Sequence[str], families: Mapping[str, Sequence[str]], deals: int = DEALS, seed: int = 0) -> Tree:
    """How parents lie among their children.

    Args:
        vectors: [emotion, d_model]; families: parent -> children, all of them among the emotions, at least two of them.
    """
    draw = torch.Generator().manual_seed(torch_seed(seed))
    unit = torch.nn.functional.normalize(vectors, dim=-1)
    place = {emotion: unit[index] for index, emotion in enumerate(emotions)}
    parents = torch.stack([place[parent] for parent in families])
    children = torch.stack([place[child] for members in families.values() for child in members])
    owner = torch.tensor([number for number, members in enumerate(families.values()) for _ in members])
    similar, gram = children @ parents.T, children @ children.T
    nearest = nearest_parents(children, parents)

    def cosines(belongs: Tensor) -> Tensor:
        """Cosine of each parent with the mean of the children that belong to it, from products alone. [..., child] -> [..., parent]."""
        member = torch.nn.functional.one_hot(belongs, len(parents)).double()
        return (member * similar).sum(-2) / (member * (gram @ member)).sum(-2).clamp_min(1e-18).sqrt()

    own = cosines(owner)
    dealt = owner[_orders(len(owner), deals, draw)]
    random = cosines(dealt)
    named = (nearest == dealt).double().mean(1)
    rows = zip(families.items(), own, random.T, strict=True)
    return Tree(
        tuple(Family(parent, tuple(members), _tested(value, null)) for (parent, members), value, null in rows),
        _tested(own.mean(), random.mean(1)),
        _tested((nearest == owner).double().mean(), named),
    )


# ---- valence, arousal and dominance --------------------------------------------------------------------------------


def map_to_places(vectors: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """The linear map from directions to places, by ridge regression: (matrix [d_model, axis], offset [axis])."""
    mean, at = vectors.mean(0), places.mean(0)
    centred = vectors - mean
    gram = centred @ centred.T
    matrix = centred.T @ torch.linalg.solve(gram + _penalty(gram), places - at)
    return matrix, at - mean @ matrix


def map_error(vectors: Tensor, places: Tensor, deals: int = DEALS, seed: int = 0) -> dict[str, Tested]:
    """How far off a linear map reads the place of an emotion that it was not fitted to: axis, or "all" -> root mean square.

    Args:
        vectors: [emotion, d_model]; places: [emotion, axis]. The null deals the places out at random.
    """
    draw = torch.Generator().manual_seed(torch_seed(seed))
    n = len(vectors)
    weights = torch.zeros(n, n, dtype=torch.float64)  # what is read of an emotion is a weighted mean of the others' places
    for left in range(n):
        others = [index for index in range(n) if index != left]
        mean = vectors[others].mean(0)
        centred = vectors[others] - mean
        gram = centred @ centred.T
        row = torch.linalg.solve(gram + _penalty(gram), centred @ (vectors[left] - mean))
        weights[left, others] = row + (1 - row.sum()) / (n - 1)

    def errors(truth: Tensor) -> Tensor:
        """[..., emotion, axis] -> [..., axis and all]."""
        squared = (weights @ truth - truth).square().mean(-2)
        return torch.cat([squared, squared.mean(-1, keepdim=True)], -1).sqrt()

    own, random = errors(places), errors(places[_orders(n, deals, draw)])
    names = ("valence", "arousal", "dominance", "all")
    return {name: _tested(own[i], random[:, i], least=True) for i, name in enumerate(names)}


def _penalty(gram: Tensor) -> Tensor:
    return RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)


def circumplex(vectors: Tensor, emotions: Sequence[str], deals: int = DEALS, seed: int = 0) -> Circumplex:
    """Whether the plane of the first two components is that of valence and arousal.

    Args:
        vectors: [emotion, d_model] of emotions that have a place. The null deals the places out at random, and may choose the better of
            the two components, too.
    """
    draw = torch.Generator().manual_seed(torch_seed(seed))
    places = places_of(emotions)
    u, s, _ = torch.linalg.svd(vectors - vectors.mean(0), full_matrices=False)
    points, axes = u[:, :PLANE] * s[:PLANE], ("valence", "arousal", "dominance")
    unit = torch.nn.functional.normalize(vectors, dim=-1)
    pairs = torch.triu_indices(len(vectors), len(vectors), 1)
    far, truly = (_rank_matrix(apart, pairs) for apart in (1 - unit @ unit.T, torch.cdist(places[:, :2], places[:, :2])))

    def alike(order: Tensor) -> Tensor:
        """Rank correlation of the distances, the places dealt in some orders: [..., emotion] -> [...]."""
        rows, columns = order[..., pairs[0]], order[..., pairs[1]]
        return _correlation(truly[rows, columns][..., None], far[pairs[0], pairs[1]][:, None])[..., 0, 0]

    orders = _orders(len(vectors), deals, draw)
    own, random = _correlation(points, places), _correlation(points, places[orders]).abs().amax(-2)
    return Circumplex(
        tuple(emotions),
        tuple(tuple(row) for row in points.tolist()),
        tuple((s.square() / s.square().sum())[:PLANE].tolist()),
        {axis: tuple(own[:, i].tolist()) for i, axis in enumerate(axes)},
        {axis: _tested(own[:, i].abs().max(), random[:, i]) for i, axis in enumerate(axes)},
        _tested(alike(torch.arange(len(vectors))), alike(orders)),
    )


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's, of columns with columns; 0 for a column that does not vary. [..., row, i], [..., row, j] -> [..., i, j]."""
    left, right = (torch.nn.functional.normalize(x - x.mean(-2, keepdim=True), dim=-2) for x in (a, b))
    return left.transpose(-2, -1) @ right


def _rank_matrix(values: Tensor, pairs: Tensor) -> Tensor:
    """The ranks of the values of pairs among themselves, the mean of them where values are equal. Shape [row, column], symmetric."""
    flat = values[pairs[0], pairs[1]]
    ranks = (flat[:, None] > flat).double().sum(1) + ((flat[:, None] == flat).double().sum(1) - 1) / 2
    found = torch.zeros_like(values)
    found[pairs[0], pairs[1]] = ranks
    return found + found.T


def _orders(n: int, deals: int, draw: torch.Generator) -> Tensor:
    """Random orders. Shape [deal, n]."""
    return torch.rand(deals, n, generator=draw).argsort(1)


def _tested(value: Tensor, null: Tensor, least: bool = False) -> Tested:
    as_good = null <= value + 1e-12 if least else null >= value - 1e-12
    return Tested(value.item(), null.mean().item(), (1 + int(as_good.sum())) / (1 + len(null)))
