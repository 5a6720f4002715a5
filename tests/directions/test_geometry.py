"""Maps of directions: what was planted is found, and beside it a null that finds nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from emosteer.base.errors import UsageError
from emosteer.directions.geometry import circumplex, geometry, map_error, map_to_places, nearest_parents, parent_direction, places_of, tree
from emosteer.models.sites import RESID_POST
from emosteer.scenarios.emotions import parse_emotions
from emosteer.scenarios.taxonomies import families_in
from tests.helpers.report_setup import directions

FINE = parse_emotions("goemotions27", closed=False)
TREE = parse_emotions("parrott:primary,parrott:secondary", closed=False)
D = 64


def noise(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def planted(size: float) -> Tensor:
    """Directions of the 27 that hold their places in three random ways, under noise of length about 1."""
    return noise(len(FINE)) / D**0.5 + size * places_of(FINE) @ torch.linalg.qr(noise(3, 1).T)[0].T


def test_a_planted_circumplex_is_found_and_none_is_not() -> None:
    found = circumplex(planted(4.0), FINE, deals=400)
    assert found.axes["valence"].value > 0.95 > 0.5 > found.axes["valence"].null and found.axes["valence"].p < 0.01
    assert found.axes["arousal"].p < 0.01 and found.distances.value > 0.6 and found.distances.p < 0.01
    assert abs(found.distances.null) < 0.05 and len(found.points) == len(FINE) and 0.5 < sum(found.explained) < 1
    nothing = circumplex(planted(0.0), FINE, deals=400)
    assert min(tested.p for tested in (*nothing.axes.values(), nothing.distances)) > 0.01


def test_a_linear_map_reads_the_place_of_an_emotion_that_it_has_not_seen() -> None:
    vectors, places = planted(4.0), places_of(FINE)
    found = map_error(vectors, places, deals=300)
    assert all(tested.value < 0.7 * tested.null and tested.p < 0.01 for tested in found.values())
    missed = []
    for left in range(len(FINE)):  # by hand, with the map itself
        others = [index for index in range(len(FINE)) if index != left]
        matrix, offset = map_to_places(vectors[others], places[others])
        missed.append(vectors[left] @ matrix + offset - places[left])
    assert found["all"].value == pytest.approx(torch.stack(missed).square().mean().sqrt().item())
    assert min(tested.p for tested in map_error(planted(0.0), places, deals=300).values()) > 0.01


def test_parents_lie_among_their_children_where_these_are_theirs() -> None:
    families = families_in(TREE)
    vectors = {emotion: vector for emotion, vector in zip(TREE, noise(len(TREE)), strict=True)}
    for parent, children in families.items():
        for child in children:
            vectors[child] = vectors[child] + vectors[parent]
    grown = torch.stack([vectors[emotion] for emotion in TREE])
    found = tree(grown, TREE, families, deals=300)
    assert found.cosine.value > 0.7 and found.cosine.value > found.cosine.null + 0.3 and found.cosine.p < 0.01
    assert found.named.value > 0.9 and found.named.null < 0.4 and found.named.p < 0.01
    assert {family.parent for family in found.families} == set(families) and all(family.cosine.value > 0.5 for family in found.families)
    love = next(family for family in found.families if family.parent == "love")
    own = torch.nn.functional.normalize(torch.stack([vectors[child] for child in love.children]), dim=-1)
    cosine = torch.nn.functional.cosine_similarity(vectors["love"], parent_direction(own), dim=0).item()
    assert love.cosine.value == pytest.approx(cosine)
    unrelated = tree(noise(len(TREE), 3), TREE, families, deals=300)
    assert unrelated.cosine.p > 0.01 and unrelated.named.p > 0.01 and abs(unrelated.cosine.value) < 0.3


def test_each_child_is_nearest_to_the_parent_that_it_came_from() -> None:
    parents = noise(4)
    children = parents.repeat_interleave(3, 0) + 0.5 * noise(12, 2)
    assert nearest_parents(children, parents).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert parent_direction(children[:3]).norm().item() == pytest.approx(1)
    assert torch.nn.functional.cosine_similarity(parent_direction(children[:3]), parents[0], dim=0) > 0.9


def test_the_geometry_of_an_artefact() -> None:
    made = directions()
    found = geometry(made, deals=50)
    assert found.circumplex is not None and found.error is not None and found.tree is None
    assert found.circumplex.emotions == made.emotions and set(found.error) == {"valence", "arousal", "dominance", "all"}
    one = geometry(made, layers=[0], deals=50)
    vectors = torch.nn.functional.normalize(made.at(RESID_POST)[:, 0], dim=-1).double()
    assert one.layers == (0,) and one.circumplex == circumplex(vectors, made.emotions, 50)
    few = replace(made, emotions=("anger", "fear", "awe", "ennui", "bother", "x"))
    assert geometry(few, deals=20).circumplex is None and geometry(few, deals=20).error is None
    with pytest.raises(UsageError, match="expected layers from 0 to"):
        geometry(made, layers=[99])
