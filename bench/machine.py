"""What the figures were measured on, and the most that its matrix units give."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path
from typing import Any

import torch

from bench.timing import interleaved


def cpu_model() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def matrix_peak(dtype: torch.dtype, size: int = 1024, repeats: int = 7) -> float:
    """GFLOP/s of the best of several square matrix products: what a model's layers could reach at most."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    out = torch.empty(size, size, dtype=dtype)
    seconds = interleaved({"mm": lambda: [torch.mm(a, b, out=out) for _ in range(4)]}, repeats, warmup=2)["mm"]
    return 4 * 2 * size**3 / min(seconds) / 1e9


def describe(threads: int) -> dict[str, Any]:
    """Facts about this machine, for the table's head. Takes a second: the matrix peak is measured."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    facts: dict[str, Any] = {
        "cpu": cpu_model(),
        "cores": cores,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": threads,
    }
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        facts[f"matrix peak {name} (GFLOP/s)"] = round(matrix_peak(dtype))
    if hasattr(os, "getloadavg"):
        facts["load at the start"] = round(os.getloadavg()[0], 2)
    return facts


def name_of(facts: dict[str, Any]) -> str:
    """A short name that is the same for runs on the same set-up (what is measured anew in each run is left out)."""
    stable = [f"{key}={facts[key]}" for key in ("cpu", "cores", "system", "python", "torch", "threads")]
    return hashlib.sha256("/".join(stable).encode()).hexdigest()[:6]
