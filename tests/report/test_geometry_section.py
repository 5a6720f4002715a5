"""The map of the directions and the tree on the page: what is drawn is what was measured, and the words stand beside the null."""

from __future__ import annotations

from dataclasses import replace

import torch

from emosteer.directions.directions import Directions
from emosteer.directions.geometry import geometry, places_of
from emosteer.report import geometry_figures
from emosteer.scenarios.emotions import parse_emotions
from tests.helpers.report_setup import directions

TREE = parse_emotions("parrott:primary,parrott:secondary", closed=False)


def spread_over(emotions: tuple[str, ...], size: float) -> Directions:
    """Directions that hold their emotions' places, under noise."""
    made = directions()
    width, draw = made.vectors.shape[-1], torch.Generator().manual_seed(1)
    axes = torch.linalg.qr(torch.randn(width, 3, generator=draw))[0].T
    vectors = size * places_of(emotions).float() @ axes + torch.randn(len(emotions), width, generator=draw) / width**0.5
    unit = torch.nn.functional.normalize(vectors, dim=-1)[:, None].expand(-1, len(made.sites), -1)
    return replace(made, emotions=emotions, vectors=unit)


def test_the_map_says_what_was_measured_and_what_chance_gives() -> None:
    known = spread_over(TREE, 8.0)
    drawn = {figure.id: figure for figure in geometry_figures.figures(known)}
    assert set(drawn) == {"map", "tree"}
    found = geometry(known)
    assert found.circumplex is not None and found.tree is not None
    assert "Both are above chance here" in drawn["map"].caption and f"{found.circumplex.axes['valence'].value:.2f}" in drawn["map"].caption
    points, nulls = drawn["map"].tables
    assert [row[0] for row in points.rows] == list(TREE) and len(nulls.rows) == 8
    for emotion in ("longing", "nervousness"):
        assert f">{emotion}</text>" in drawn["map"].panels[0].svg
    assert len(drawn["tree"].tables[0].rows) == len(found.tree.families) + 2
    nothing = {figure.id: figure for figure in geometry_figures.figures(spread_over(TREE, 0.0))}
    assert "shows no circumplex" in nothing["map"].caption


def test_nothing_is_drawn_of_emotions_without_a_place() -> None:
    assert [figure.id for figure in geometry_figures.figures(directions())] == ["map"], "the six have no parents among them"
    assert geometry_figures.figures(replace(directions(), emotions=("a", "b", "c", "d", "e", "f"))) == []
