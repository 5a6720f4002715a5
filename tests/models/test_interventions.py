"""Unit edits do exactly and only what they say, on both trees, and in generation from t* on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from emosteer.generation.decoding import Decoding
from emosteer.generation.generate import Request, generate
from emosteer.models.interventions import RowEdits, replace_units, unit_masks, unit_site, unit_slice
from emosteer.models.model import Model
from emosteer.models.sites import KINDS, Head, Neuron, Site, Unit
from tests.helpers import reference
from tests.helpers.precision import forward_bound

IDS = torch.tensor([[1, 7, 9, 12, 30, 41], [1, 8, 20, 15, 33, 5], [1, 60, 22, 17, 9, 14]])
ROWS: list[list[Unit]] = [[Head(0, 1), Neuron(1, 5), Head(2, 3)], [], [Neuron(1, 5), Neuron(1, 47), Head(0, 0), Head(0, 3)]]
FORMS = ("zero", "mean", "per row", "per position")


def everywhere(model: Model) -> list[Site]:
    return [Site(layer, kind) for layer in range(model.shape.n_layers) for kind in KINDS]


def values_of(model: Model, form: str, sites: list[Site]) -> dict[Site, Tensor] | None:
    draw = torch.Generator().manual_seed(3)
    lead = {"mean": (), "per row": (3,), "per position": (3, IDS.shape[1])}
    return None if form == "zero" else {site: torch.randn(*lead[form], model.width(site.kind), generator=draw) for site in sites}


@torch.no_grad()
@pytest.mark.parametrize("bridge", [False, True])
@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_replaced_units_have_the_new_value_and_nothing_else_is_touched(tiny: Model, form: str, limited: bool, bridge: bool) -> None:
    sites = [Site(0, "z"), Site(1, "mlp_post"), Site(2, "z")]
    values = values_of(tiny, form, sites)
    positions = torch.tensor([[0, 0, 1, 0, 1, 1], [1, 1, 1, 1, 1, 1], [0, 1, 0, 0, 0, 0]]) if limited else None
    edits = replace_units(tiny, ROWS, values, positions)
    assert sorted(edits) == sites
    for site in sites:  # one site at a time: all of it against the untouched run
        before = tiny.read(IDS, everywhere(tiny), bridge=bridge)
        after = tiny.read(IDS, everywhere(tiny), edits={site: edits[site]}, bridge=bridge)
        expected = before[site].clone()
        for row, units in enumerate(ROWS):
            for unit in units:
                if (unit.layer, "z" if isinstance(unit, Head) else "mlp_post") != (site.layer, site.kind):
                    continue
                size = tiny.shape.d_head if isinstance(unit, Head) else 1
                for position in range(IDS.shape[1]):
                    if positions is not None and not positions[row, position]:
                        continue
                    for entry in range(unit.index * size, (unit.index + 1) * size):
                        new = (
                            0.0
                            if values is None
                            else values[site].expand(3, 6, -1)[row, position, entry]
                            if form != "per row"
                            else values[site][row, entry]
                        )
                        expected[row, position, entry] = new
        assert torch.equal(after[site], expected), str(site)
        last = Site(2, "resid_post")
        bound = forward_bound(before[last])  # what is behind an edit may lie elsewhere in memory and be summed in another order
        assert (after[last][1] - before[last][1]).abs().max() <= bound, "a row without units changed"
        first = 0 if positions is None else int(positions[2].argmax())
        assert first == 0 or (after[last] - before[last])[2, :first].abs().max() <= bound, "a position before the first one changed"
        if site.layer < 2:
            assert not torch.allclose(after[last][2, first:], before[last][2, first:], atol=1e-4)
        for other in everywhere(tiny):
            if other.layer < site.layer:
                assert torch.equal(after[other], before[other]), str(other)


@torch.no_grad()
def test_the_two_trees_and_bare_hooks_agree_on_the_outcome(family: Model) -> None:
    rows = [[Head(0, 1), Neuron(1, 5)], [Neuron(0, 9)], [Head(2, 2)]]
    positions = torch.tensor([[0, 0, 1, 0, 1, 1]] * 3)
    edits = replace_units(family, rows, None, positions)
    size = family.shape.d_head

    def zero(row: int, part: slice):  # noqa: ANN202
        def change(x: Tensor) -> Tensor:
            x = x.clone()
            for position in (2, 4, 5):
                x[row, position, part] = 0
            return x

        return change

    changes = {
        (0, "z"): zero(0, slice(size, 2 * size)),
        (1, "mlp_post"): zero(0, slice(5, 6)),
        (0, "mlp_post"): zero(1, slice(9, 10)),
        (2, "z"): zero(2, slice(2 * size, 3 * size)),
    }
    with reference.changed(family.hf, changes):
        expected = family.hf(input_ids=IDS, use_cache=False).logits
    for bridge in (False, True):
        torch.testing.assert_close(family.logits(family.run(IDS, edits, bridge=bridge)), expected, rtol=1e-4, atol=1e-4)


def test_masks_say_where_a_unit_is(tiny: Model) -> None:
    size = tiny.shape.d_head
    assert (unit_site(Head(1, 2)), unit_site(Neuron(2, 3))) == (Site(1, "z"), Site(2, "mlp_post"))
    assert (unit_slice(tiny, Head(1, 2)), unit_slice(tiny, Neuron(2, 3))) == (slice(2 * size, 3 * size), slice(3, 4))
    masks = unit_masks(tiny, ROWS)
    assert {str(site): mask.sum(1).tolist() for site, mask in masks.items()} == {
        "L0.z": [size, 0, 2 * size],
        "L1.mlp_post": [1, 0, 2],
        "L2.z": [size, 0, 0],
    }
    assert masks[Site(1, "mlp_post")][2].nonzero()[:, 0].tolist() == [5, 47]


# ---- in generation ---------------------------------------------------------------------------------------------------

PROMPTS = ((1, 7, 9, 12, 30, 41, 4), (1, 8, 20, 4), (1, 50, 33, 21, 17, 60, 44, 13, 3, 4), (1, 70, 4))


#: Strong, or the Gemma model of tied embeddings repeats one token whatever is done to it.
PENALTY = 3.0


def row_values(model: Model, masks: dict[Site, Tensor]) -> dict[Site, Tensor]:
    draw = torch.Generator().manual_seed(5)
    return {site: 2 * torch.randn(mask.shape, generator=draw) for site, mask in masks.items()}


def stops_that_end_rows_apart(model: Model, changes: list[reference.Changes]) -> frozenset[int]:
    """Two tokens as stops: what row 1 writes second and what row 3 writes sixth; the others go on."""
    return frozenset({reference.greedy(model, PROMPTS[row], changes[row], 6, frozenset(), PENALTY)[0][at] for row, at in ((1, 1), (3, 5))})


@pytest.mark.parametrize("form", ["zero", "replace", "enhance"])
def test_row_edits_act_from_the_last_prompt_position_on(family: Model, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    units: list[list[Unit]] = [
        [Head(0, 1), Neuron(1, 5)],
        [Head(0, 0), Head(2, 1), Neuron(1, 7)],
        [],
        [Neuron(1, 5), Neuron(1, 6), Head(1, 3)],
    ]
    masks = unit_masks(family, units)
    values = None if form == "zero" else row_values(family, masks)
    strength = 1.5 if form == "enhance" else None

    def change(site: Site, row: int):  # noqa: ANN202
        mask, value = masks[site][row], None if values is None else values[site][row]
        if value is None:
            return lambda x: x * ~mask
        return (lambda x: x + strength * value * mask) if form == "enhance" else (lambda x: torch.where(mask, value, x))

    changes = [{(site.layer, site.kind): change(site, row) for site in masks} for row in range(4)]
    stops = stops_that_end_rows_apart(family, changes)
    monkeypatch.setitem(family.__dict__, "stop_ids", stops)
    expected = [reference.greedy(family, prompt, changes[row], 12, stops, PENALTY)[0] for row, prompt in enumerate(PROMPTS)]
    assert len({len(ids) for ids in expected}) > 1, "the rows must end at different times"
    unedited = [reference.greedy(family, prompt, {}, 12, stops, PENALTY)[0] for prompt in PROMPTS]
    assert sum(a != b for a, b in zip(expected, unedited, strict=True)) >= 2, "the edits must matter"
    found = generate(
        family,
        [Request(str(row), prompt) for row, prompt in enumerate(PROMPTS)],
        decoding=Decoding(max_new_tokens=12, repetition_penalty=PENALTY),
        row_edits=RowEdits(masks, values, scale=strength),
    )
    assert [reply.ids for reply in found] == expected


@torch.no_grad()
def test_row_edits_leave_the_prompt_as_it_was(tiny: Model) -> None:
    masks = unit_masks(tiny, ROWS)
    before = tiny.read(IDS, everywhere(tiny), bridge=False)
    after = tiny.read(IDS, everywhere(tiny), edits=RowEdits(masks, None).edits(), bridge=False)
    for site in everywhere(tiny):
        assert (after[site] - before[site])[:, :-1].abs().max() <= forward_bound(before[site]), str(site)
    assert not torch.allclose(after[Site(2, "resid_post")][0, -1], before[Site(2, "resid_post")][0, -1], atol=1e-3)


@torch.no_grad()
def test_enhancement_of_all_units_equals_unit_edits(tiny: Model) -> None:
    shape, draw = tiny.shape, torch.Generator().manual_seed(6)
    z = torch.randn(3, shape.n_layers, shape.n_heads * shape.d_head, generator=draw)
    mlp = torch.randn(3, shape.n_layers, shape.d_mlp, generator=draw)
    values = {Site(layer, kind): x[:, layer] for layer in range(shape.n_layers) for kind, x in (("z", z), ("mlp_post", mlp))}
    masks = {site: torch.ones_like(value, dtype=torch.bool) for site, value in values.items()}
    first = IDS[:, :1]  # a single position: all of it is t*
    enhanced = tiny.run(first, RowEdits(masks, values, scale=0.7).edits(), bridge=False)
    torch.testing.assert_close(enhanced, tiny.run(first, reference.unit_edits(0.7 * z, 0.7 * mlp), bridge=False), rtol=1e-5, atol=1e-5)
    half = {site: mask & (torch.arange(mask.shape[1]) % 2 == 0) for site, mask in masks.items()}
    keep = [torch.arange(x.shape[-1]) % 2 == 0 for x in (z, mlp)]
    expected = tiny.run(first, reference.unit_edits(0.7 * z * keep[0], 0.7 * mlp * keep[1]), bridge=False)
    torch.testing.assert_close(tiny.run(first, RowEdits(half, values, scale=0.7).edits(), bridge=False), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_kept_rows_keep_their_own_edits(tiny: Model) -> None:
    masks = unit_masks(tiny, ROWS)
    values = row_values(tiny, masks)
    whole = tiny.run(IDS, RowEdits(masks, values).edits(), bridge=False)
    edits = RowEdits(masks, values)
    edits.keep(torch.tensor([0, 2]))
    torch.testing.assert_close(tiny.run(IDS[[0, 2]], edits.edits(), bridge=False), whole[[0, 2]])
    edits.keep(torch.tensor([2]))  # indices stay those of the original batch
    torch.testing.assert_close(tiny.run(IDS[[2]], edits.edits(), bridge=False), whole[[2]])
