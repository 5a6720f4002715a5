"""Steered generation against unsteered, and batches of mixed emotions against batches of one."""

from __future__ import annotations

from collections.abc import Iterator

from bench.results import Bar, Row
from bench.timing import interleaved, median, ratio
from bench.workload import Workbench, decoding, endless
from emosteer.generation.generate import generate

FAMILY = "steering"
#: batch size -> (new tokens, rounds): large batches write fewer, so that the whole stays within minutes.
SIZES = {1: (32, 5), 8: (32, 4), 32: (24, 3), 128: (12, 3)}
#: Mixed emotions are compared at this batch size.
MIXED = 32


def run(bench: Workbench) -> Iterator[Row]:
    """One row per batch size, and the one for mixed emotions."""
    for size, (tokens, rounds) in SIZES.items():
        mixed = size == MIXED
        wanted = [f"{FAMILY}.batch{size}", *([f"{FAMILY}.mixed"] if mixed else [])]
        if any(map(bench.wants, wanted)) and not (bench.quick and size > MIXED):
            yield from _rows(bench, size, bench.pick(tokens, 6), bench.pick(rounds, 1), mixed)


def _rows(bench: Workbench, size: int, tokens: int, rounds: int, mixed: bool) -> Iterator[Row]:
    model, requests = bench.model(), bench.requests(size)
    n = len(bench.circuit.emotions)
    plans = {"unsteered": None, "steered": bench.plan([0] * size)}
    if mixed:
        plans["mixed"] = bench.plan([index % n for index in range(size)])
    with endless(model):
        work = {name: lambda plan=plan: generate(model, requests, plan, decoding(tokens)) for name, plan in plans.items()}
        seconds = interleaved(work, rounds, warmup=0 if size > MIXED else 1)  # the largest batch comes when all is warm
    rate = {name: size * tokens / median(times) for name, times in seconds.items()}
    found = ratio(seconds["unsteered"], seconds["steered"])
    length = sum(len(request.ids) for request in requests) / size
    yield Row.of(
        f"{FAMILY}.batch{size}",
        f"steered generation, batch {size}: tokens/s of unsteered",
        found.value,
        Bar(0.97),
        spread=found,
        note=f"{tokens} new tokens, prompts of {length:.0f}: steered {rate['steered']:.0f} tokens/s, unsteered {rate['unsteered']:.0f}",
    )
    if mixed:
        both = ratio(seconds["steered"], seconds["mixed"])
        note = f"{n} emotions in turn: {rate['mixed']:.0f} tokens/s"
        yield Row.of(
            f"{FAMILY}.mixed", f"batch {size} of mixed emotions: tokens/s of one emotion", both.value, Bar(0.95), spread=both, note=note
        )
