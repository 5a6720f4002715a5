"""Probes of all units of a place and all runs at once (folds, penalties, shuffled labels), fitted by passes over shards.

A run is one way of fitting: which texts count, with which labels. All runs see the same states, so that one matrix product serves them
all. The linear probe is multinomial logistic regression with an L2 penalty, the non-linear one a layer of GELUs before it. States are
standardised by one mean and one spread for all runs, over the texts that any of them is fitted on: where runs take turns in holding out,
what one of them holds out has its share in these, though its labels have none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, gelu

from emosteer.base.seeds import torch_seed

#: One shard after the other: numbers of texts [b], states [b, unit, width].
Shards = Callable[[], Iterator[tuple[Tensor, Tensor]]]
#: Step size of Adam at the first step; it falls to nothing in a straight line.
RATE = 0.02
#: A feature that hardly varies is not scaled up beyond this.
LEAST_SPREAD = 1e-4


@dataclass(frozen=True, eq=False)
class Runs:
    """labels: [run, text], numbers; weights: [run, text], 0 for texts that a run does not see; decays: [unit, run]."""

    labels: Tensor
    weights: Tensor
    decays: Tensor

    @property
    def n(self) -> int:
        """How many runs."""
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class Fitted:
    """Fitted probes. mean, scale: [unit, width]; layers: weights [unit, width, run, out] and biases [unit, run, out] of one linear map, or
    of two with GELUs in between, the second's weights [unit, run, hidden, label]."""

    mean: Tensor
    scale: Tensor
    layers: tuple[Tensor, ...]

    def logits(self, states: Tensor) -> Tensor:
        """States [b, unit, width] -> [b, unit, run, label]."""
        return _logits(self.layers, (states.to(self.mean) - self.mean) / self.scale)

    def run(self, number: int) -> Fitted:
        """One run's probe alone."""
        first = (self.layers[0][:, :, [number]], self.layers[1][:, [number]])
        return Fitted(self.mean, self.scale, (*first, *(layer[:, [number]] for layer in self.layers[2:])))


def _logits(layers: Sequence[Tensor], z: Tensor) -> Tensor:
    weight, bias = layers[0], layers[1]
    first = (z.transpose(0, 1) @ weight.flatten(2)).unflatten(2, weight.shape[2:]).transpose(0, 1) + bias
    if len(layers) == 2:
        return first
    return torch.einsum("burh,urhk->burk", gelu(first), layers[2]) + layers[3]


def moments(shards: Shards, used: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and spread of every feature over the texts that are used, in one pass. Shapes [unit, width].

    Args:
        used: [text], true or false.
    """
    count, total, square, origin = 0, torch.tensor(0.0), torch.tensor(0.0), None
    for index, states in shards():
        states = states[used[index]].double()
        if len(states):
            origin = states[0] if origin is None else origin  # squares of differences: a stream may be long and vary little
            count, total, square = count + len(states), total + (states - origin).sum(0), square + ((states - origin) ** 2).sum(0)
    assert origin is not None
    mean = total / count
    spread = (square / count - mean**2).clamp_min(0).sqrt()
    return (mean + origin).float(), spread.clamp_min(LEAST_SPREAD).float()


def fit(shards: Shards, runs: Runs, n_labels: int, *, hidden: int = 0, epochs: int = 40, seed: int = 0) -> Fitted:
    """Fits every run's probe on every unit by Adam, one step a shard.

    Args:
        hidden: width of the non-linear layer; 0 for linear probes.
    """
    mean, scale = moments(shards, (runs.weights > 0).any(0))
    layers = _start(mean.shape, runs.n, n_labels, hidden, seed)
    steps = epochs * sum(1 for _ in shards())
    optimiser = torch.optim.Adam(layers, lr=RATE)
    falling = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
    share = runs.weights.sum(1)
    for _ in range(epochs):
        for index, states in shards():
            logits = _logits(layers, (states - mean) / scale)
            loss = (_losses(logits, runs.labels[:, index]) * runs.weights[:, index]).sum(-1) / share * (runs.weights.shape[1] / len(index))
            penalty = sum(
                (layer**2).sum([d for d in range(layer.ndim) if d not in _kept(place, layer)]) for place, layer in weights(layers)
            )
            optimiser.zero_grad()
            (loss + runs.decays * penalty / 2).sum().backward()
            optimiser.step()
            falling.step()
    return Fitted(mean, scale, tuple(layer.detach() for layer in layers))


def weights(layers: Sequence[Tensor]) -> list[tuple[int, Tensor]]:
    """The matrices among the layers, which are penalised, with their places."""
    return [(place, layers[place]) for place in range(0, len(layers), 2)]


def _kept(place: int, layer: Tensor) -> tuple[int, int]:
    """Which dimensions of a matrix are its unit and its run."""
    return (0, 2) if place == 0 else (0, 1)


def _start(size: torch.Size, n_runs: int, n_labels: int, hidden: int, seed: int) -> list[Tensor]:
    units, width = size
    if not hidden:
        layers = [torch.zeros(units, width, n_runs, n_labels), torch.zeros(units, n_runs, n_labels)]
    else:
        drawn = torch.randn(units, width, 1, hidden, generator=torch.Generator().manual_seed(torch_seed(seed))) / width**0.5
        layers = [drawn.repeat(1, 1, n_runs, 1), torch.zeros(units, n_runs, hidden)]
        layers += [torch.zeros(units, n_runs, hidden, n_labels), torch.zeros(units, n_runs, n_labels)]
    return [layer.requires_grad_() for layer in layers]


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy [unit, run, b] of logits [b, unit, run, label] and labels [run, b]."""
    wanted = labels.T[:, None, :].expand(logits.shape[:3])
    return cross_entropy(logits.flatten(0, 2), wanted.flatten(), reduction="none").view(wanted.shape).permute(1, 2, 0)


@torch.no_grad()
def held_out_loss(shards: Shards, fitted: Fitted, labels: Tensor, held: Tensor) -> Tensor:
    """Mean cross-entropy on the texts that each run holds out. Shape [unit, run].

    Args:
        labels: [run, text]; held: [run, text], true for texts that count.
    """
    total: Tensor | float = 0.0
    for index, states in shards():
        total = total + (_losses(fitted.logits(states), labels[:, index]) * held[:, index]).sum(-1)
    assert isinstance(total, Tensor)
    return total / held.sum(1)


@torch.no_grad()
def probabilities(shards: Shards, fitted: Fitted, chosen: Tensor) -> Tensor:
    """Probabilities of the labels for some texts, in order. Shape [unit, run, text, label].

    Args:
        chosen: [text], true or false.
    """
    found = [fitted.logits(states[chosen[index]]).softmax(-1) for index, states in shards() if chosen[index].any()]
    return torch.cat(found).permute(1, 2, 0, 3)


def choose_decay(
    shards: Shards, labels: Tensor, folds: Tensor, n_labels: int, decays: Sequence[float], *, hidden: int, epochs: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Cross-validation of the penalty, by the loss on held-out folds.

    Args:
        labels, folds: [text]; texts of a fold below 0 are not looked at.

    Returns:
        The best penalty [unit], and its mean held-out loss [unit].
    """
    n_folds = int(folds.max()) + 1
    train = folds >= 0
    held = torch.stack([folds == fold for fold in range(n_folds)]).repeat_interleave(len(decays), 0)
    units = next(iter(shards()))[1].shape[1]
    penalties = torch.tensor(decays).repeat(n_folds)
    runs = Runs(labels.expand(len(held), -1), (train & ~held).float(), penalties.expand(units, -1))
    fitted = fit(shards, runs, n_labels, hidden=hidden, epochs=epochs, seed=seed)
    losses = held_out_loss(shards, fitted, runs.labels, held).unflatten(1, (n_folds, len(decays))).mean(1)
    best = losses.argmin(1)
    return torch.tensor(decays)[best], losses.gather(1, best[:, None])[:, 0]


def shuffled(labels: Tensor, among: Tensor, seed: int) -> Tensor:
    """The labels, dealt out anew among some of the texts. Shape [text].

    Args:
        among: [text], true for those whose labels are shuffled.
    """
    where = among.nonzero()[:, 0]
    order = torch.randperm(len(where), generator=torch.Generator().manual_seed(torch_seed(seed)))
    dealt = labels.clone()
    dealt[where] = labels[where[order]]
    return dealt
