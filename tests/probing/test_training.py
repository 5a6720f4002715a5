"""Probes on made-up states: a planted direction is found, noise and shuffled labels are not, and what is fitted is the optimum."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from emosteer.probing import training
from emosteer.probing.training import Runs, Shards, choose_decay, fit, held_out_loss, moments, probabilities, shuffled

N, WIDTH, LABELS = 240, 12, 3


def shards_of(states: Tensor, size: int = 64) -> Shards:
    """States [text, unit, width] in shards."""

    def shards() -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(states), size):
            yield torch.arange(start, min(start + size, len(states))), states[start : start + size]

    return shards


def planted(strength: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """States of two units, of which the second holds its label along a direction of its own; labels; the directions [label, width]."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(LABELS, (N,), generator=draw)
    directions = torch.linalg.qr(torch.randn(WIDTH, LABELS, generator=draw))[0].T
    states = torch.randn(N, 2, WIDTH, generator=draw)
    states[:, 1] += strength * directions[labels]
    return 5 + 3 * states, labels, directions


def one_run(labels: Tensor, train: Tensor, decay: float = 0.01, units: int = 2) -> Runs:
    return Runs(labels[None], train[None].float(), torch.full((units, 1), decay))


def accuracy(states: Tensor, labels: Tensor, fitted: training.Fitted, chosen: Tensor, unit: int, run: int = 0) -> float:
    read = probabilities(shards_of(states), fitted, chosen)[unit, run].argmax(-1)
    return float((read == labels[chosen]).double().mean())


def test_a_planted_direction_is_found_in_the_unit_that_has_it_and_only_there() -> None:
    states, labels, directions = planted(5.0)
    train = torch.arange(N) < 160
    fitted = fit(shards_of(states), one_run(labels, train), LABELS)
    assert accuracy(states, labels, fitted, ~train, 1) > 0.95 and accuracy(states, labels, fitted, ~train, 0) < 0.5
    weights = fitted.layers[0][1, :, 0].T / fitted.scale[1]
    apart = normalize(weights[0] - weights[1], dim=0) @ normalize(directions[0] - directions[1], dim=0)
    assert apart > 0.8, "of 12 dimensions, from 160 noisy texts"


def test_shuffled_labels_are_at_chance_and_deal_out_the_same_labels() -> None:
    states, labels, _ = planted(5.0)
    train = torch.arange(N) < 160
    dealt = torch.stack([shuffled(labels, train, seed) for seed in range(8)])
    for row in dealt:
        assert torch.equal(row[~train], labels[~train]) and torch.equal(row[train].bincount(), labels[train].bincount())
        assert 0.2 < (row[train] == labels[train]).double().mean() < 0.5
    fitted = fit(shards_of(states), Runs(dealt, train.float().expand(8, -1), torch.full((2, 8), 0.01)), LABELS)
    hits = [accuracy(states, labels, fitted, ~train, 1, run) for run in range(8)]
    assert abs(sum(hits) / 8 - 1 / LABELS) < 0.1


def test_the_linear_probe_is_the_optimum_of_the_penalised_loss() -> None:
    states, labels, _ = planted(2.0)
    train = torch.arange(N) % 3 > 0
    fitted = fit(shards_of(states), one_run(labels, train, 0.05), LABELS, epochs=150)
    z = ((states[train, 1] - fitted.mean[1]) / fitted.scale[1]).double()
    weight, bias = torch.zeros(WIDTH, LABELS, dtype=torch.float64, requires_grad=True), torch.zeros(LABELS, dtype=torch.float64)
    bias.requires_grad_()

    def loss(w: Tensor, b: Tensor) -> Tensor:
        return cross_entropy(z @ w + b, labels[train]) + 0.05 / 2 * (w**2).sum()

    optimiser = torch.optim.LBFGS([weight, bias], max_iter=200, tolerance_grad=1e-9)

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = loss(weight, bias)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    found = fitted.layers[0][1, :, 0].double()
    assert loss(found, fitted.layers[1][1, 0].double()).item() == pytest.approx(loss(weight, bias).item(), rel=2e-3)
    torch.testing.assert_close(found, weight.detach(), atol=0.05, rtol=0.1)


def test_runs_fitted_together_are_those_fitted_alone() -> None:
    states, labels, _ = planted(2.0)
    half = torch.arange(N) < 120
    both = Runs(torch.stack([labels, labels.flip(0)]), torch.stack([half, half]).float(), torch.tensor([[0.01, 0.1]] * 2))
    together = fit(shards_of(states), both, LABELS, hidden=3, epochs=5, seed=1)
    for run in range(2):
        single = Runs(both.labels[[run]], both.weights[[run]], both.decays[:, [run]])
        alone = fit(shards_of(states), single, LABELS, hidden=3, epochs=5, seed=1)
        torch.testing.assert_close(together.logits(states)[:, :, run], alone.logits(states)[:, :, 0], atol=1e-4, rtol=1e-4)


def test_only_a_non_linear_probe_reads_what_no_line_parts() -> None:
    draw = torch.Generator().manual_seed(3)
    states = torch.randn(320, 1, 3, generator=draw)
    labels = (states[:, 0, 0] * states[:, 0, 1] > 0).long()
    train = torch.arange(320) < 240
    hits = [
        accuracy(states, labels, fit(shards_of(states), one_run(labels, train, 1e-4, 1), 2, hidden=hidden, epochs=60), ~train, 0)
        for hidden in (0, 16)
    ]
    assert hits[0] < 0.65 and hits[1] > 0.85


def test_the_penalty_is_chosen_by_what_folds_that_were_held_out_lose() -> None:
    states, labels, _ = planted(5.0)
    folds = torch.arange(N) % 4 - 1  # a quarter is test
    garbled = states.clone()
    garbled[folds < 0] = 1e6  # nothing of the test texts may be looked at
    decays, losses = choose_decay(shards_of(garbled), labels, folds, LABELS, (0.001, 0.01, 10.0), hidden=0, epochs=30, seed=0)
    assert decays[0] == pytest.approx(10.0) and decays[1] <= 0.011, "noise is best ignored, a direction is not"
    assert losses[0] == pytest.approx(torch.tensor(3.0).log().item(), abs=0.05) and losses[1] < 0.4


def test_held_out_loss_is_the_mean_over_the_texts_held_out() -> None:
    states, labels, _ = planted(2.0)
    held = torch.arange(N) < 50
    fitted = fit(shards_of(states), one_run(labels, ~held), LABELS, epochs=5)
    expected = cross_entropy(fitted.logits(states[:50])[:, 1, 0], labels[:50])
    assert held_out_loss(shards_of(states), fitted, labels[None], held[None])[1, 0] == pytest.approx(expected.item(), abs=1e-5)


def test_moments_in_one_pass_are_those_of_all_texts_and_a_constant_feature_stays_put() -> None:
    states, _, _ = planted(1.0)
    states[:, 0, 0] = 1000.0
    used = torch.arange(N) % 2 == 0
    mean, scale = moments(shards_of(states, 50), used)
    torch.testing.assert_close(mean, states[used].mean(0), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(scale[1], states[used, 1].std(0, correction=0), atol=1e-4, rtol=1e-4)
    assert scale[0, 0] == pytest.approx(training.LEAST_SPREAD)
