"""Attribution is proved by intervening: ablate, patch, perturb, with hooks of its own wherever the module has some."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from emosteer.attribution.gradients import attribution_patching, other_emotions_mean, score_gradients, true_patches, unpacked_batch
from emosteer.attribution.unit_scores import (
    contrast_scores,
    head_contributions,
    neuron_contributions,
    raw_scores,
    top_units,
    unit_mask,
    written_direction,
)
from emosteer.base.artifacts import Provenance
from emosteer.base.errors import DegenerateDirection
from emosteer.directions.activations import Sample, read_positions, read_states
from emosteer.directions.contrast import Contrasts, make_plan
from emosteer.directions.directions import Directions, UnitStats, from_contrasts, reference_directions, stable_band
from emosteer.models.model import Model
from emosteer.models.sites import KINDS, MLP_POST, RESID_MID, RESID_POST, Head, Neuron, Site, Unit, Z, residual_sites
from emosteer.scenarios.scenarios import GroupKey
from tests.conftest import build, tiny_tokenizer
from tests.helpers import reference

PROMPTS = ((1, 7, 9, 12, 30, 41), (1, 8, 20), (1, 50, 33, 21, 17, 60, 44, 13, 3))
EMOTIONS = ("anger", "sadness", "happiness")


def random_directions(model: Model, *lead: int, seed: int = 0) -> Tensor:
    """Unit vectors [*lead, layer, d_model]."""
    vectors = torch.randn(*lead, model.shape.n_layers, model.shape.d_model, generator=torch.Generator().manual_seed(seed))
    return vectors / vectors.norm(dim=-1, keepdim=True)


def samples(count: int = 3, replies: bool = True) -> list[Sample]:
    """Groups with three emotions; replies (or prompts, without replies) of different lengths."""
    draw = torch.Generator().manual_seed(7)

    def words(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(6, 70, (n,), generator=draw).tolist())

    made = []
    for index in range(count):
        key = GroupKey(f"s{index}", ("positive", "neutral", "negative")[index % 3])
        if replies:
            made.append(Sample(key, "t", ((1, *words(3 + index), 4),) * 3, tuple(words(n + index) for n in (2, 5, 3))))
        else:
            made.append(Sample(key, "t", tuple((1, *words(3 + n), 4) for n in range(3)), ((),) * 3))
    return made


def make_directions(model: Model, groups: Sequence[Sample]) -> Directions:
    shape = model.shape
    plan = make_plan([(s.key.scenario, s.theme) for s in groups], EMOTIONS, 0.0, 0)
    contrasts = Contrasts(plan, shape.n_layers, shape.d_model, shape.n_heads * shape.d_head, shape.d_mlp)
    sites = [*residual_sites(shape.n_layers), *(Site(layer, kind) for layer in range(shape.n_layers) for kind in (Z, MLP_POST))]
    contrasts.update(groups, read_states(model, groups, sites))
    return from_contrasts(contrasts, elicitation="reply", instruction="", dropped={}, provenance=Provenance("", "", "", ""))


def planted(vectors: Tensor) -> Directions:
    """Directions whose resid_post vectors are given as [emotion, layer, d_model]; the mid ones are noise."""
    n, n_layers, d_model = vectors.shape
    sites = residual_sites(n_layers)
    both = torch.randn(n, len(sites), d_model, generator=torch.Generator().manual_seed(1))
    both[:, [i for i, site in enumerate(sites) if site.kind == RESID_POST]] = vectors
    none = UnitStats(*(torch.zeros(1, n_layers, 1),) * 3)
    ones = torch.ones(n, len(sites))
    return Directions(
        tuple("abcdef"[:n]), sites, both, ones, ones[0], both[0], both, none, none, None, "reply", "", 1, 0, {}, Provenance("", "", "", "")
    )


def all_units(model: Model) -> list[Unit]:
    shape = model.shape
    heads = [Head(layer, i) for layer in range(shape.n_layers) for i in range(shape.n_heads)]
    return [*heads, *(Neuron(layer, i) for layer in range(shape.n_layers) for i in range(shape.d_mlp))]


def entries(model: Model, unit: Unit) -> slice:
    return (
        slice(unit.index * model.shape.d_head, (unit.index + 1) * model.shape.d_head)
        if isinstance(unit, Head)
        else slice(unit.index, unit.index + 1)
    )


def place(unit: Unit) -> tuple[int, str]:
    return unit.layer, "z" if isinstance(unit, Head) else "mlp_post"


def keeping(store: dict[str, Tensor], name: str) -> Callable[[Tensor], Tensor]:
    """A change that changes nothing and keeps the activation."""

    def keep(x: Tensor) -> Tensor:
        store[name] = x
        return x

    return keep


def double(family: str) -> Model:
    """A tiny model in double precision throughout (Hugging Face's norms go through float32), for finite differences."""
    hf = build(family).hf.double()
    for module in hf.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = lambda x, m=module: m.weight * x * (x.square().mean(-1, keepdim=True) + m.variance_epsilon).rsqrt()
    return Model.from_hf(hf, tiny_tokenizer(), f"tiny-double-{family}")


@pytest.fixture(scope="module")
def wide() -> Model:
    """The tiny llama in double precision."""
    return double("llama")


# ---- contributions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_contributions_equal_the_drop_when_every_unit_is_really_ablated(name: str) -> None:
    model = build(name)
    units = all_units(model)
    v_mid, v_post = random_directions(model, seed=1), random_directions(model, seed=2)
    for prompt, position in zip(PROMPTS[1:], (-1, 4), strict=True):
        contribution, drop = reference.ablation_drops(model, torch.tensor([prompt]), position, units, v_mid, v_post)
        for some in (slice(0, 12), slice(12, None)):  # heads, neurons
            scale = drop[some].abs().max()
            assert scale > 1e-3
            assert (contribution[some] - drop[some]).abs().max() <= 1e-4 * scale


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_contributions_equal_ablations_done_with_bare_hooks(name: str) -> None:
    model = double(name)
    n_layers = model.shape.n_layers
    v_mid, v_post = random_directions(model, seed=3).double(), random_directions(model, seed=4).double()
    for prompt in PROMPTS:
        places = [(layer, kind) for layer in range(n_layers) for kind in KINDS]
        base = reference.seen(model.hf, prompt, places)
        z, mlp = (torch.stack([base[layer, kind] for layer in range(n_layers)], dim=1) for kind in ("z", "mlp_post"))
        heads, neurons = head_contributions(model, z, v_mid), neuron_contributions(model, mlp, v_post)  # [pos, layer, unit]
        for layer, kind in ((layer, kind) for layer in range(n_layers) for kind in ("z", "mlp_post")):
            units = [unit for unit in all_units(model) if place(unit) == (layer, kind)]
            mask = torch.zeros(len(units), 1, model.width(kind), dtype=torch.bool)
            for row, unit in enumerate(units):
                mask[row, :, entries(model, unit)] = True
            target = "resid_mid" if kind == "z" else "resid_post"
            after: dict[str, Tensor] = {}
            changes = {(layer, kind): lambda x, mask=mask: x.masked_fill(mask, 0), (layer, target): keeping(after, target)}
            with reference.changed(model.hf, changes):
                model.hf(input_ids=torch.tensor([prompt]).expand(len(units), -1), use_cache=False)
            drop = (base[layer, target] - after[target]) @ (v_mid if kind == "z" else v_post)[layer]  # [unit, pos]
            table = heads if kind == "z" else neurons
            torch.testing.assert_close(table[:, layer].T, drop, rtol=1e-4, atol=1e-9)


def test_contributions_add_up_to_the_projection_of_what_the_sublayer_writes(family: Model) -> None:
    """Heads sum to the projection of attn_out, neurons to that of mlp_out; with post-norms up to one positive factor per layer and
    position, the same for every direction: the norm's scale."""
    n_layers, prompt = family.shape.n_layers, PROMPTS[2]
    base = reference.seen(family.hf, prompt, [(layer, kind) for layer in range(n_layers) for kind in KINDS])
    for kind, out, after, table in (
        ("z", "attn_out", "resid_mid", head_contributions),
        ("mlp_post", "mlp_out", "resid_post", neuron_contributions),
    ):
        units = torch.stack([base[layer, kind] for layer in range(n_layers)], dim=1)
        for seed in range(3):
            v = random_directions(family, seed=seed)
            total = table(family, units, v).sum(-1)
            for layer in range(1, n_layers):
                added = base[layer, after] - (base[layer, "resid_mid"] if after == "resid_post" else base[layer - 1, "resid_post"])
                scale = 1.0
                if family.family.post_norms:
                    scale = (base[layer, out].square().mean(-1) + family.hf.config.rms_norm_eps).sqrt()
                torch.testing.assert_close(total[:, layer], (added @ v[layer]) * scale, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_gemma_contributions_are_exact_up_to_the_scale_of_its_post_norm() -> None:
    """With the norm's scale held at its clean value, ablating a unit lowers the projection by contribution / scale."""
    model = double("gemma3")
    v = random_directions(model, seed=5).double()
    prompt, eps = PROMPTS[0], model.hf.config.rms_norm_eps
    for layer in range(model.shape.n_layers):
        block = model.layers[layer]
        sites = {kind: (layer, kind) for kind in KINDS}
        base = reference.seen(model.hf, prompt, list(sites.values()))
        for kind, out, after, norm, table in (
            ("z", "attn_out", "resid_mid", block.post_attention_layernorm, head_contributions),
            ("mlp_post", "mlp_out", "resid_post", block.post_feedforward_layernorm, neuron_contributions),
        ):
            scale = (base[layer, out].square().mean(-1, keepdim=True) + eps).sqrt()
            full = torch.stack(
                [base[layer, kind] if k == layer else torch.zeros_like(base[layer, kind]) for k in range(model.shape.n_layers)], 1
            )
            scores = table(model, full, v)[:, layer]

            def frozen(_: object, args: tuple[Tensor], __: Tensor, norm: torch.nn.Module = norm, scale: Tensor = scale) -> Tensor:
                return args[0] / scale * (1 + norm.weight)

            handle = norm.register_forward_hook(frozen)
            clean = reference.seen(model.hf, prompt, [(layer, after)])[layer, after]
            for index in range(0, scores.shape[1], 5):
                unit = Head(layer, index) if kind == "z" else Neuron(layer, index)
                part = entries(model, unit)

                def zero(x: Tensor, where: slice = part) -> Tensor:
                    x = x.clone()
                    x[..., where] = 0
                    return x

                ablated = reference.seen(model.hf, prompt, [(layer, after)], {(layer, kind): zero})[layer, after]
                torch.testing.assert_close(
                    scores[:, index] / scale[:, 0], (clean - ablated) @ v[layer], rtol=1e-5, atol=1e-9, msg=str(unit)
                )
            handle.remove()


def test_a_direction_is_left_as_it_is_without_post_norms(tiny: Model) -> None:
    v = random_directions(tiny)
    assert torch.equal(written_direction(tiny, 1, RESID_MID, v), v)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_scores_equal_the_mean_over_groups_computed_one_unit_at_a_time(name: str) -> None:
    model, groups = build(name), samples()
    directions = make_directions(model, groups)
    n_layers, places = model.shape.n_layers, [(layer, kind) for layer in range(model.shape.n_layers) for kind in ("z", "mlp_post")]
    states: dict[tuple[int, str], Tensor] = {p: torch.zeros(len(groups), 3, model.width(p[1])) for p in places}
    for g, sample in enumerate(groups):
        for e in range(3):
            prompt, reply = sample.prompts[e], sample.replies[e]
            found = reference.seen(model.hf, prompt + reply, places)
            for p in places:
                states[p][g, e] = found[p][len(prompt) - 1 : len(prompt) + len(reply) - 1].mean(0)
    contrast, raw = contrast_scores(model, directions), raw_scores(model, directions)
    site = {kind: [i for i, s in enumerate(directions.sites) if s.kind == kind] for kind in (RESID_MID, RESID_POST)}
    for layer in range(n_layers):
        block = model.hf.model.layers[layer]
        gains = (1.0, 1.0)
        if model.family.post_norms:
            gains = (1 + block.post_attention_layernorm.weight, 1 + block.post_feedforward_layernorm.weight)
        w_o, w_down = block.self_attn.o_proj.weight, block.mlp.down_proj.weight  # [d_model, in]
        for e in range(3):
            v_mid, v_post = (
                directions.vectors[e, site[RESID_MID][layer]] * gains[0],
                directions.vectors[e, site[RESID_POST][layer]] * gains[1],
            )
            z, mlp = states[layer, "z"], states[layer, "mlp_post"]
            for table, shift in ((contrast, 1), (raw, 0)):
                for h in range(model.shape.n_heads):
                    part = slice(h * model.shape.d_head, (h + 1) * model.shape.d_head)
                    slow = [float((w_o[:, part] @ (z[g, e, part] - shift * z[g, :, part].mean(0))) @ v_mid) for g in range(len(groups))]
                    assert table.heads[e, layer, h].item() == pytest.approx(sum(slow) / len(slow), rel=1e-3, abs=1e-5)
                    assert table.of(e, Head(layer, h)) == table.heads[e, layer, h].item()
                for n in range(0, model.shape.d_mlp, 7):
                    slow = [float((mlp[g, e, n] - shift * mlp[g, :, n].mean()) * (w_down[:, n] @ v_post)) for g in range(len(groups))]
                    assert table.neurons[e, layer, n].item() == pytest.approx(sum(slow) / len(slow), rel=1e-3, abs=1e-5)
                    assert table.of(e, Neuron(layer, n)) == table.neurons[e, layer, n].item()


# ---- the final score -------------------------------------------------------------------------------------------------


def unit_rows(angles: Sequence[float], d_model: int = 4) -> Tensor:
    """One vector per layer, turned by the given angles in a plane; the same for two emotions in different planes."""
    t = torch.tensor(angles)
    both = torch.zeros(2, len(angles), d_model)
    both[0, :, 0], both[0, :, 1], both[1, :, 2], both[1, :, 3] = t.cos(), t.sin(), t.cos(), t.sin()
    return both


@pytest.mark.parametrize(
    ("angles", "band"),
    [
        ([0, 1, 2, 3, 4, 4.1, 4.2, 4.3, 5.5], (4, 5, 6, 7)),  # planted late, not to the very end
        ([0, 0.1, 0.2, 0.3, 0.4, 1.5, 2.5, 3.5, 3.6], (7, 8)),  # a longer band that ends too early does not count
        ([0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 1.6, 1.7], (0, 1, 2, 3, 4, 5, 6)),  # of two late ones the longer
        ([0, 0.7, 1.4, 2.1, 2.8, 3.5, 4.2, 4.8, 5.5], (6, 7)),  # nothing is still: the stillest late pair
        ([0, 0.1, 1.1, 2.1, 3.2, 4.2, 5.1, 6.1, 7.1], (5, 6)),  # ... a still early pair is not it
        ([0, 1], (0, 1)),
        ([0], (0,)),
    ],
)
def test_the_stable_band_is_found_where_it_was_planted(angles: list[float], band: tuple[int, ...]) -> None:
    assert stable_band(planted(unit_rows(angles))) == band


def test_the_band_is_judged_by_the_mean_over_emotions_and_by_the_threshold() -> None:
    vectors = unit_rows([0, 1, 2, 3, 4, 5, 6, 6.2, 6.4])
    assert stable_band(planted(vectors)) == (6, 7, 8)
    vectors[1] = unit_rows([0, 1, 2, 3, 4, 5, 6, 6.9, 7.7])[1]  # the other emotion moves: means of 0.80 and 0.84
    assert stable_band(planted(vectors), threshold=0.99) == (7, 8), "the stiller of the two late pairs"
    assert stable_band(planted(vectors), threshold=0.79) == (6, 7, 8)
    assert stable_band(planted(vectors), threshold=0.81) == (7, 8)


def test_reference_directions_are_the_normalised_mean_over_the_band() -> None:
    vectors = unit_rows([0, 1, 2, 3])
    found = reference_directions(planted(vectors), (2, 3))
    expected = torch.zeros(2, 4)
    middle = torch.tensor(2.5)  # the mean of two unit vectors points half-way between them
    expected[0, :2] = expected[1, 2:] = torch.stack([middle.cos(), middle.sin()])
    torch.testing.assert_close(found, expected)


def test_a_band_whose_directions_cancel_is_refused() -> None:
    with pytest.raises(DegenerateDirection, match="layers 1 to 2 cancel out.*narrower"):
        reference_directions(planted(unit_rows([0, 0.5, 0.5 + torch.pi, 1])), (1, 2))


def slow_score(model: Model, ids: Sequence[int], where: Sequence[int], v: Tensor, changes: reference.Changes) -> float:
    """The final score of one unpadded sequence: last raw residual, averaged over `where`, projected on v."""
    last = (model.shape.n_layers - 1, "resid_post")
    return float(reference.seen(model.hf, ids, [last], changes)[last][list(where)].mean(0) @ v.double())


def test_score_gradients_equal_finite_differences_at_every_site(wide: Model) -> None:
    groups = samples(2)
    v_ref = random_directions(wide, 3, seed=8)[:, 0]
    batch = unpacked_batch(wide, groups)
    sites = [Site(layer, kind) for layer in range(wide.shape.n_layers) for kind in KINDS]
    found = score_gradients(wide, batch, v_ref.repeat(2, 1), sites)
    draw = torch.Generator().manual_seed(9)
    for state, (sample, e) in enumerate((s, e) for s in groups for e in range(3)):
        prompt, reply = sample.prompts[e], sample.replies[e]
        ids, where = prompt + reply, read_positions(len(prompt), len(reply))
        assert found.scores[state].item() == pytest.approx(slow_score(wide, ids, where, v_ref[e], {}), rel=1e-5)
        for site in sites:
            step = torch.randn(len(ids), wide.width(site.kind), generator=draw, dtype=torch.float64)
            ends = [
                slow_score(wide, ids, where, v_ref[e], {(site.layer, site.kind): lambda x, s=s, d=step: x + s * d}) for s in (1e-5, -1e-5)
            ]
            slope = (found.grad[site][state, : len(ids)].double() * step).sum().item()
            assert slope == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-4, abs=1e-5), (str(site), state)
            assert not found.grad[site][state, len(ids) :].any(), "padding got a gradient"


# ---- patching --------------------------------------------------------------------------------------------------------


def test_the_patch_source_is_the_mean_of_the_others() -> None:
    states = torch.tensor([[[1.0, 10.0], [2.0, 20.0], [6.0, 60.0]], [[0.0, 0.0], [0.0, 3.0], [9.0, 0.0]]])
    expected = torch.tensor([[[4.0, 40.0], [3.5, 35.0], [1.5, 15.0]], [[4.5, 1.5], [4.5, 0.0], [0.0, 1.5]]])
    torch.testing.assert_close(other_emotions_mean(states), expected)


@torch.no_grad()
def by_hand(model: Model, sample: Sample, emotion: int, units: Sequence[Unit], v: Tensor, amount: float) -> Tensor:
    """Drops [unit] of the final score when a unit goes by `amount` (1: all the way) from its values to its mean in the other
    emotions. One row per unit, bare hooks, nothing padded or packed."""
    places = sorted({place(unit) for unit in units})
    means: dict[tuple[int, str], Tensor] = {}
    for e, (prompt, reply) in enumerate(zip(sample.prompts, sample.replies, strict=True)):
        found = reference.seen(model.hf, prompt + reply, places)
        for p in places:
            if e != emotion:
                means[p] = means.get(p, 0) + found[p][len(prompt) - 1 : len(prompt) - 1 + max(len(reply), 1)].mean(0) / 2
    prompt, reply = sample.prompts[emotion], sample.replies[emotion]
    where = slice(len(prompt) - 1, len(prompt) - 1 + max(len(reply), 1))

    def patching(p: tuple[int, str]) -> Callable[[Tensor], Tensor]:
        def change(x: Tensor) -> Tensor:
            new = x.clone()
            for row, unit in enumerate(units):
                if place(unit) == p:
                    part = entries(model, unit)
                    new[row, where, part] += amount * (means[p][part] - x[row, where, part])
            return new

        return change

    out: dict[str, Tensor] = {}
    ids = torch.tensor([prompt + reply])
    last = (model.shape.n_layers - 1, "resid_post")
    with reference.changed(model.hf, {last: keeping(out, "clean")}):
        model.hf(input_ids=ids, use_cache=False)
    with reference.changed(model.hf, {**{p: patching(p) for p in places}, last: keeping(out, "patched")}):
        model.hf(input_ids=ids.expand(len(units), -1), use_cache=False)
    return (out["clean"][:, where] - out["patched"][:, where]).mean(1) @ v.double()


def test_true_patches_equal_patches_done_by_hand(wide: Model) -> None:
    groups = samples(2)
    v_ref = random_directions(wide, 3, seed=10)[:, 1]
    units = [*(u for u in all_units(wide) if isinstance(u, Head)), *(Neuron(layer, n) for layer in range(3) for n in (0, 17, 47))]
    for emotion in range(3):
        truth = true_patches(wide, groups, v_ref, emotion, units, rows=5)
        hand = torch.stack([by_hand(wide, s, emotion, units, v_ref[emotion], 1.0) for s in groups]).mean(0)
        torch.testing.assert_close(truth.double(), hand, rtol=1e-4, atol=1e-6)


def test_attribution_patching_is_the_slope_of_the_patch(wide: Model) -> None:
    """The estimate equals the true change over an infinitesimal step from clean towards the patch, times the whole way."""
    groups = samples(2)
    v_ref = random_directions(wide, 3, seed=11)[:, 1]
    estimate, clean = attribution_patching(wide, groups, v_ref)
    units = [*(u for u in all_units(wide) if isinstance(u, Head)), *(Neuron(layer, n) for layer in range(3) for n in (3, 21))]
    for emotion in range(3):
        slopes = torch.stack([by_hand(wide, s, emotion, units, v_ref[emotion], 1e-6) for s in groups]).mean(0) / 1e-6
        found = torch.tensor([estimate.of(emotion, unit) for unit in units], dtype=torch.float64)
        torch.testing.assert_close(found, slopes, rtol=1e-3, atol=1e-5)
        for g, sample in enumerate(groups):
            prompt, reply = sample.prompts[emotion], sample.replies[emotion]
            score = slow_score(wide, prompt + reply, read_positions(len(prompt), len(reply)), v_ref[emotion], {})
            assert clean[g, emotion].item() == pytest.approx(score, rel=1e-5)


def test_a_group_that_lacks_an_emotion_is_patched_as_if_it_were_whole(tiny: Model) -> None:
    """With directions whose contrasts are this group's own, what is missing is known exactly."""
    for replies in (True, False):
        (whole,) = samples(1, replies)
        others = random_directions(tiny, 3, seed=14)[:, 1]
        made = make_directions(tiny, [whole])
        units = [*(u for u in all_units(tiny) if isinstance(u, Head)), *(Neuron(layer, n) for layer in range(3) for n in (0, 17, 47))]
        estimate, clean = attribution_patching(tiny, [whole], others)
        for held in ((0, 2), (1, 2)):
            part = replace(whole, prompts=pick(whole.prompts, held), replies=pick(whole.replies, held), emotions=held)
            found, scores = attribution_patching(tiny, [part], others, made)
            (gone,) = {0, 1, 2} - set(held)
            assert not found.heads[gone].any() and not found.neurons[gone].any() and scores[0, gone].isnan()
            torch.testing.assert_close(scores[0, list(held)], clean[0, list(held)], rtol=1e-4, atol=1e-4)
            for mine, theirs in ((found.heads, estimate.heads), (found.neurons, estimate.neurons)):
                scale = theirs.abs().max().item()
                torch.testing.assert_close(mine[list(held)], theirs[list(held)], rtol=1e-3, atol=1e-4 * scale)
            for emotion in held:
                truth = true_patches(tiny, [whole], others, emotion, units)
                patched = true_patches(tiny, [part], others, emotion, units, made)
                torch.testing.assert_close(patched, truth, rtol=1e-3, atol=1e-4 * truth.abs().max().item())
        both, _ = attribution_patching(tiny, [whole, part], others, made)  # the mean of an emotion is over the groups that hold it
        torch.testing.assert_close(both.heads[gone], estimate.heads[gone], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="lacks emotions"):
        attribution_patching(tiny, [part], others)


def pick(values: tuple[tuple[int, ...], ...], numbers: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    return tuple(values[number] for number in numbers)


def near_model(epsilon: float) -> Model:
    """A double-precision model to which tokens 20, 21 and 22 look nearly the same."""
    model = double("llama")
    table = model.hf.model.embed_tokens.weight
    table[21] = table[20] + epsilon * table[30]
    table[22] = table[20] + epsilon * table[31]
    return model


def test_estimate_and_truth_agree_to_first_order_for_a_tiny_patch() -> None:
    errors = []
    for epsilon in (0.01, 0.001):
        model = near_model(epsilon)
        groups = [Sample(GroupKey("s", "neutral"), "t", tuple((1, 7, token, 9, 4) for token in (20, 21, 22)), ((),) * 3)]
        v_ref = random_directions(model, 3, seed=12)[:, 1]
        estimate, _ = attribution_patching(model, groups, v_ref)
        units = [unit for unit in all_units(model) if isinstance(unit, Head) or unit.index % 4 == 0]
        truth = true_patches(model, groups, v_ref, 1, units, rows=64)
        guess = torch.tensor([estimate.of(1, unit) for unit in units])
        errors.append(((guess - truth).norm() / truth.norm()).item())
    assert errors[0] < 0.1
    assert errors[1] < errors[0] / 5  # the error is of second order: ten times smaller steps, ten times smaller relative error


def test_the_estimate_ranks_units_as_true_patches_do(tiny: Model) -> None:
    groups = samples(3, replies=False)
    v_ref = random_directions(tiny, 3, seed=13)[:, 1]
    estimate, _ = attribution_patching(tiny, groups, v_ref)
    units = all_units(tiny)
    truth = true_patches(tiny, groups, v_ref, 0, units, rows=64)
    guess = torch.tensor([estimate.of(0, unit) for unit in units])
    ranks = torch.stack([guess.argsort().argsort().float(), truth.argsort().argsort().float()])
    assert torch.corrcoef(ranks)[0, 1] > 0.8
    big = truth.abs() > truth.abs().quantile(0.9)
    assert (guess.sign() == truth.sign())[big].float().mean() > 0.8


# ---- order and masks -------------------------------------------------------------------------------------------------


def test_top_units_are_ordered_by_score_and_named_by_layer_and_index() -> None:
    table = torch.tensor([[0.1, -5.0, 0.3], [0.9, 0.2, -0.1]])
    assert top_units(table, 4, Head) == [Head(1, 0), Head(0, 2), Head(1, 1), Head(0, 0)]
    assert top_units(table, 99, Neuron)[-1] == Neuron(0, 1)
    assert len(top_units(table, 99, Neuron)) == 6


def test_unit_masks_cover_the_units_and_nothing_else(tiny: Model) -> None:
    z, mlp = unit_mask(tiny, [Head(1, 2), Neuron(0, 5), Neuron(2, 47)])
    size = tiny.shape.d_head
    assert z.nonzero().tolist() == [[1, i] for i in range(2 * size, 3 * size)]
    assert mlp.nonzero().tolist() == [[0, 5], [2, 47]]
    assert z.sum() == size and mlp.sum() == 2
