"""Token sequences that begin alike, packed so that every distinct prefix is computed once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PrefixTree:
    """Several sequences as the nodes of one prefix tree; a node stands for a token and everything before it.

    tokens, positions: [node]. paths: [path, width], the nodes of the sequences that are no prefix of another, filled up with node 0 on
    the right; a path has `lengths` [path] nodes, of which those before `begins` [path] stand in earlier paths too. place: [node], where in
    the flattened `paths` a node is found first. rows: [row, width], the nodes of every sequence, ending in
    the last column, filled up with node 0 on the left. known: of each beginning that is known already its nodes; these are the first
    `n_known` of all, and stand before every path's `begins`.
    """

    tokens: Tensor
    positions: Tensor
    paths: Tensor
    begins: Tensor
    lengths: Tensor
    place: Tensor
    rows: Tensor
    known: tuple[Tensor, ...] = ()
    n_known: int = 0


def pack(sequences: Sequence[Sequence[int]], width: int, device: torch.device, known: Sequence[Sequence[int]] = ()) -> PrefixTree:
    """Packs sequences of at most `width` tokens, at least one of them not empty. known: beginnings of some of them, each shorter than a
    sequence, that need not be computed."""
    children: dict[tuple[int, int], int] = {}
    tokens: list[int] = []
    positions: list[int] = []
    chains: list[list[int]] = []
    inner: set[int] = set()
    n_known = 0
    for index, sequence in enumerate((*known, *sequences)):
        n_known = len(tokens) if index == len(known) else n_known
        chain: list[int] = []
        parent = -1
        for position, token in enumerate(sequence):
            node = children.setdefault((parent, token), len(tokens))
            if node == len(tokens):
                tokens.append(token)
                positions.append(position)
                inner.add(parent)
            chain.append(node)
            parent = node
        chains.append(chain)
    paths: dict[int, list[int]] = {chain[-1]: chain for chain in chains if chain and chain[-1] not in inner}
    length = max(map(len, paths.values()))
    place = [0] * len(tokens)
    for index, chain in reversed(list(enumerate(paths.values()))):
        for position, node in enumerate(chain):
            place[node] = index * length + position
    begins = [sum(node < n_known or place[node] < index * length for node in chain) for index, chain in enumerate(paths.values())]
    return PrefixTree(
        torch.tensor(tokens, device=device),
        torch.tensor(positions, device=device),
        torch.tensor([[*chain, *[0] * (length - len(chain))] for chain in paths.values()], device=device),
        torch.tensor(begins, device=device),
        torch.tensor([len(chain) for chain in paths.values()], device=device),
        torch.tensor(place, device=device),
        torch.tensor([[*[0] * (width - len(chain)), *chain] for chain in chains[len(known) :]], device=device),
        tuple(torch.tensor(chain, device=device) for chain in chains[: len(known)]),
        n_known,
    )


def chunks(sequences: Sequence[Sequence[int]], budget: int) -> Iterator[list[int]]:
    """Indices of the sequences in ascending groups of at most `budget` distinct tokens (or one sequence); those that begin alike come
    together, empty ones not at all."""
    group: list[int] = []
    before: Sequence[int] = ()
    size = 0
    for index in sorted((i for i in range(len(sequences)) if sequences[i]), key=lambda i: tuple(sequences[i])):
        here = sequences[index]
        new = len(here) - shared(before, here) if group else len(here)
        if group and size + new > budget:
            yield sorted(group)
            group, size, new = [], 0, len(here)
        group.append(index)
        size, before = size + new, here
    if group:
        yield sorted(group)


def shared(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences share at their beginning."""
    for count, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return count
    return min(len(first), len(second))
