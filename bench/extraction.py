"""`extract` against the plain forward pass of the same model on the same texts."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bench.machine import matrix_peak
from bench.results import Bar, Row
from bench.timing import interleaved, median, ratio
from bench.workload import Workbench, settings
from emosteer.directions.activations import Sample, TokenRow, make_batch, rows_of
from emosteer.directions.directions import Directions
from emosteer.directions.extract import extract, finish_checkpoint
from emosteer.directions.settings import Settings
from emosteer.models.model import Model
from emosteer.scenarios.scenarios import Bank, Group

FAMILY = "extract"


@torch.no_grad()
def plain_forward(model: Model, samples: Sequence[Sample], budget: int) -> None:
    """The forward pass that anybody would run: every text a row, texts of similar length together, no hooks, no unembedding."""
    rows: list[TokenRow] = sorted((row for sample in samples for row in rows_of(sample, packed=False)), key=lambda row: -len(row.ids))
    start = 0
    while start < len(rows):
        stop = start + max(1, budget // len(rows[start].ids))
        batch = make_batch(model, rows[start:stop])
        model.body(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
        start = stop


def statistics(found: Directions) -> dict[str, Tensor]:
    """What an extraction measures: mean contrasts [emotion, site, d_model] and the moments of residuals, heads and neurons."""
    return {
        "contrast": found.vectors * found.norms[..., None],
        "rms": found.rms[:, None],
        "base": found.base,
        "z": found.z.mean,
        "z base": found.z.base,
        "neurons": found.mlp.mean,
        "neurons base": found.mlp.base,
    }


def difference(found: Directions, expected: Directions) -> float:
    """Largest relative difference of any statistic at any site: the norm of the difference over the norm of what is expected."""
    a, b = statistics(found), statistics(expected)
    return max(((a[name] - b[name]).norm(dim=-1) / b[name].norm(dim=-1)).max().item() for name in a)


def runner(model: Model, groups: Sequence[Group], bank: Bank | None, chosen: Settings, folder: Path) -> Callable[[], Directions]:
    """The stage as the command runs it: tokens, batches, statistics, checkpoints, directions."""

    def run() -> Directions:
        checkpoint = folder / "checkpoint"
        found = extract(model, groups, chosen, bank=bank, checkpoint=checkpoint, fresh=True)
        finish_checkpoint(checkpoint)
        return found

    return run


def flops_per_token(model: Model) -> float:
    """Multiplications and additions of the layers' weights for one token (attention between positions left out)."""
    return 2.0 * sum(p.numel() for p in model.layers.parameters() if p.dim() == 2)


def run(bench: Workbench) -> Iterator[Row]:
    """The rows of this family, precision by precision."""
    for dtype in ("float32", "bfloat16"):
        names = [f"{FAMILY}.{dtype}.{name}" for name in ("unpacked", "packed", "equal", "peak")]
        if any(map(bench.wants, names)):
            yield from _rows(bench, dtype)


def _rows(bench: Workbench, dtype: str) -> Iterator[Row]:
    model = bench.model(dtype)
    data, samples = bench.data(bench.pick(8, 3)), bench.samples(bench.pick(8, 3))
    tokens = sum(len(p) + len(r) for sample in samples for p, r in zip(sample.prompts, sample.replies, strict=True))
    texts = sum(len(sample.prompts) for sample in samples)
    budget = settings().batch_tokens
    with tempfile.TemporaryDirectory() as folder:
        work = {
            "plain": lambda: plain_forward(model, samples, budget),
            **{
                name: runner(model, data.groups, data.bank, settings(packed), Path(folder))
                for name, packed in (("unpacked", False), ("packed", True))
            },
        }
        plain_forward(model, samples[:1], budget)  # warm; a whole round would cost as much as one that counts
        seconds = interleaved(work, bench.pick(3, 1), warmup=0)
        simple = settings(packed=False)
        one_by_one = Settings(simple.emotions, packed=False, batch_tokens=1)
        expected = runner(bench.model(), data.groups, data.bank, one_by_one, Path(folder))()
        error = difference(runner(model, data.groups, data.bank, settings(), Path(folder))(), expected)
    rate = {name: tokens / median(times) for name, times in seconds.items()}
    unpacked, gain = ratio(seconds["plain"], seconds["unpacked"]), ratio(seconds["unpacked"], seconds["packed"])
    overall = ratio(seconds["plain"], seconds["packed"])
    work_done = f"{len(samples)} scenario-events, {texts} texts, {tokens} tokens"
    note = f"{work_done}; plain {rate['plain']:,.0f} tokens/s, extract {rate['unpacked']:,.0f}"
    what = f"extract {dtype}"
    prefix = f"{FAMILY}.{dtype}"
    yield Row.of(
        f"{prefix}.unpacked",
        f"{what}, no prefix reuse: tokens/s of the plain forward pass",
        unpacked.value,
        Bar(0.85),
        spread=unpacked,
        note=note,
    )
    yield Row.of(
        f"{prefix}.packed",
        f"{what}, prefix reuse (the default): prompts/s of the same without",
        gain.value,
        Bar(2),
        spread=gain,
        note=f"{texts / median(seconds['packed']):.1f} replies read a second, {overall.value:.2f} x the plain pass",
    )
    fp32 = dtype == "float32"
    yield Row.of(
        f"{prefix}.equal",
        f"{what}: largest relative difference of a statistic to one scenario-event at a time, float32, no reuse",
        error,
        Bar(1e-4, "", at_least=False) if fp32 else None,
        unit="",
        note="" if fp32 else "what rounding to bfloat16 does; the sums are float64 in both",
    )
    peak = matrix_peak(model.dtype)
    computed = sum(sample.cost for sample in samples)
    share = computed / median(seconds["packed"]) * flops_per_token(model) / 1e9 / peak
    yield Row.of(
        f"{prefix}.peak",
        f"{what}, prefix reuse: share of the machine's matrix peak",
        100 * share,
        unit="%",
        note=f"peak {peak:,.0f} GFLOP/s; the plain pass reaches {rate['plain'] * flops_per_token(model) / 1e7 / peak:.0f} %",
    )
