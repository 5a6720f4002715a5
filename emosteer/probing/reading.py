"""Texts in the user's turn -> states, kept shard by shard on disk: memory holds one shard at most, however many texts there are.

A shard is a safetensors file with the states of some texts at all places. What a killed run had finished is there for the next one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from emosteer.base import artifacts
from emosteer.base.artifacts import Provenance
from emosteer.base.errors import DataError
from emosteer.base.progress import bar, note
from emosteer.directions.activations import TokenRow, batches_by, read_rows
from emosteer.models.hooks import Edit
from emosteer.models.memory import halve_on_oom, release_memory
from emosteer.models.model import Model
from emosteer.models.sites import Site

#: Texts of a shard: also those of one step of training.
SHARD = 128
KIND = "piece"
BLANK = Provenance(model="", model_sha256="", template_sha256="", method=KIND)


def frame(model: Model, system: str | None = None) -> list[int]:
    """The tokens before a text in the user's turn.

    Args:
        system: a system line; the template's own where there is none.
    """
    first = [] if system is None else [{"role": "system", "content": system}]
    bare, filled = (model.prompt_ids([*first, {"role": "user", "content": content}]) for content in ("", "A"))
    same = next((i for i, (a, b) in enumerate(zip(bare, filled, strict=False)) if a != b), min(len(bare), len(filled)))
    return filled[:same]


def text_row(model: Model, before: Sequence[int], text: str, read: str, longest: int) -> TokenRow:
    """One text behind a frame.

    Args:
        read: "mean" averages over the text's positions, "last" reads the last.
        longest: tokens of the text that are kept.

    Raises:
        DataError: if the text has no token, or does not fit the context.
    """
    ids = model.text_ids(text)[:longest]
    size = len(before) + len(ids)
    if not ids:
        raise DataError(f"the text '{text[:40]}' has no token in the vocabulary of {model.name}; leave it out")
    if size > model.shape.context:
        raise DataError(f"{size} tokens do not fit the context of {model.name} ({model.shape.context} tokens); read less of each text")
    where = range(len(before), size) if read == "mean" else (size - 1,)
    return TokenRow((*before, *ids), tuple(range(size)), (0,) * size, (tuple(where),))


@dataclass(frozen=True, eq=False)
class States:
    """The states of n texts in shards. sizes: texts of each shard, in order; units: name of a place -> units side by side (heads)."""

    files: tuple[Path, ...]
    sizes: tuple[int, ...]
    units: Mapping[str, int]

    @property
    def n(self) -> int:
        """How many texts."""
        return sum(self.sizes)

    def shards(self, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """(the texts' numbers [b], their states at a place [b, unit, width]), one shard after the other."""
        start = 0
        for file, size in zip(self.files, self.sizes, strict=True):
            with safe_open(file, framework="pt") as opened:
                states = opened.get_tensor(name)
            yield torch.arange(start, start + size), states.unflatten(1, (self.units[name], -1))
            start += size


def read_shards(
    model: Model,
    rows: Sequence[TokenRow],
    sites: Sequence[Site],
    folder: Path,
    *,
    budget: int,
    names: Sequence[str] | None = None,
    units: Mapping[str, int] | None = None,
    described: str = "read (texts)",
) -> States:
    """Reads the states of sequences, shard by shard. Shards that an earlier run left in the folder are not computed again: whoever
    gives the folder says by its name what they depend on.

    Args:
        names: for sequences with several reads (at one site), what each is called; otherwise a state is called after its site.
        units: name -> how many units lie side by side in a state, 1 where it is not told.
        budget: tokens per forward pass.
    """
    starts = range(0, len(rows), SHARD)
    files = tuple(folder / f"states-{number}.safetensors" for number in range(len(starts)))
    sizes = tuple(min(SHARD, len(rows) - start) for start in starts)
    called = tuple(names) if names else tuple(map(str, sites))
    done = sum(size for file, size in zip(files, sizes, strict=True) if _whole(file, size))
    if done:
        note(f"going on after {done} of {len(rows)} texts")
    with bar(described, len(rows), done) as advance:
        for file, start, size in zip(files, starts, sizes, strict=True):
            if not _whole(file, size):
                states = _shard(model, rows[start : start + size], sites, budget)
                if names:
                    states = dict(zip(names, states[str(sites[0])].unbind(1), strict=True))
                else:
                    states = {name: state[:, 0] for name, state in states.items()}
                artifacts.save(file, KIND, {"texts": size}, states, BLANK)
                advance(size)
                release_memory()
    return States(files, sizes, {name: (units or {}).get(name, 1) for name in called})


def _whole(file: Path, size: int) -> bool:
    return file.exists() and (artifacts.load_fields(file, KIND) or {}).get("texts") == size


def _shard(model: Model, rows: Sequence[TokenRow], sites: Sequence[Site], budget: int) -> dict[str, Tensor]:
    """name of a site -> [row, read, width]."""
    states = {str(site): torch.empty(len(rows), len(rows[0].reads), model.width(site.kind)) for site in sites}
    for index, found in passes(model, rows, sites, budget):
        for site, values in found.items():
            states[str(site)][index] = values.float().cpu()
    return states


def passes(
    model: Model, rows: Sequence[TokenRow], sites: Sequence[Site], budget: int, edits: Mapping[Site, Edit] | None = None
) -> Iterator[tuple[list[int], dict[Site, Tensor]]]:
    """(numbers of rows, site -> their states [row, read, width]) of one forward pass after the other, similar lengths together."""

    def compute(index: list[int]) -> tuple[list[int], dict[Site, Tensor]]:
        found = read_rows(model, [rows[i] for i in index], sites, edits=edits)
        return index, {site: state.unflatten(0, (len(index), -1)) for site, state in found.items()}

    for batch in batches_by(range(len(rows)), lambda i: len(rows[i].ids), budget):
        yield from halve_on_oom(batch, compute, note, "texts")
