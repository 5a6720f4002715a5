"""Devices and precisions by name, and telling a lack of memory from other errors."""

from __future__ import annotations

import importlib.util

import torch

from emosteer.base.errors import UsageError
from emosteer.base.processes import local_rank, local_world
from emosteer.models.quantised import QUANTISED

#: Ways to lay a model's layers over the GPUs of a machine.
DEVICE_MAPS = ("auto", "balanced", "sequential")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(device: str) -> torch.device:
    """Turns "auto", "cpu", "cuda" or "cuda:N" into a device that exists. "auto" gives each process of `torchrun` its own GPU.

    Raises:
        UsageError: if the name is unknown or the device is not there.
    """
    if device == "auto":
        rank = local_rank()
        if rank is not None and torch.cuda.is_available():  # more processes than GPUs: they share
            return torch.device("cuda", rank % torch.cuda.device_count())
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"unknown device '{device}'; expected auto, cpu, cuda or cuda:N") from error
    if target.type not in ("cpu", "cuda"):
        raise UsageError(f"device '{device}' is not supported; expected auto, cpu, cuda or cuda:N")
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device '{device}' is not there: this machine has {torch.cuda.device_count()} CUDA devices; try --device auto")
    return target


def check_device_map(name: str, device: str) -> str:
    """A layout over several devices that can be used here.

    Raises:
        UsageError: if the name is unknown, accelerate is missing, or a device was asked for as well.
    """
    if name not in DEVICE_MAPS:
        raise UsageError(f"unknown device map '{name}'; expected {', '.join(DEVICE_MAPS)}")
    if device != "auto":
        raise UsageError(f"expected --device or --device-map, found both ('{device}' and '{name}')")
    if importlib.util.find_spec("accelerate") is None:
        raise UsageError("--device-map needs the package accelerate, which is not installed; run `pip install accelerate`")
    return name


def own_gpus() -> list[int]:
    """The GPUs that a model may be laid over: all, or this process's equal share of them (4 processes on 8 GPUs have 2 each).

    Raises:
        UsageError: if there are more processes on this machine than GPUs.
    """
    count, processes = torch.cuda.device_count(), local_world()
    if processes == 1:
        return list(range(count))
    share = count // processes
    if count and not share:
        raise UsageError(f"expected at most {count} processes on this machine, one per GPU, found {processes}; lower --nproc-per-node")
    first = (local_rank() or 0) * share
    return list(range(first, first + share))


def resolve_dtype(dtype: str, device: str) -> torch.dtype:
    """Turns "auto" or a dtype's name into a torch dtype.

    Raises:
        UsageError: if the name is unknown.
    """
    if dtype == "auto":
        return torch.bfloat16 if resolve_device(device).type == "cuda" else torch.float32
    if dtype not in _DTYPES:
        raise UsageError(f"unknown dtype '{dtype}'; expected auto, {', '.join([*_DTYPES, *QUANTISED])}")
    return _DTYPES[dtype]


def slow_in_bfloat16(device: torch.device) -> bool:
    """Whether a device's matrix products are known to be much slower in bfloat16 than in float32: on processors without units for it."""
    return device.type == "cpu" and torch.backends.mkldnn.is_available() and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
