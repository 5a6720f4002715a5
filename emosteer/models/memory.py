"""Memory of the host and the device: telling a lack of it, giving it back, halving what does not fit."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from emosteer.base.errors import OutOfMemory, says_out_of_memory

#: Enough for the layers of a few shapes at a time.
KERNELS_KEPT = 64
_MADV_HUGEPAGE = 14

Item = TypeVar("Item")
Result = TypeVar("Result")


def halve_on_oom(
    items: list[Item], compute: Callable[[list[Item]], Result], warn: Callable[[str], None], what: str = "groups"
) -> Iterator[Result]:
    """Runs `compute(items)`; where the batch does not fit in memory, runs its halves instead and says so.

    Raises:
        OutOfMemory: if a single item does not fit.
    """
    try:
        yield compute(items)
        return
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if len(items) == 1:
            raise single_item_too_large() from error
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    middle = len(items) // 2
    warn(f"out of memory: the batch of {len(items)} {what} is halved")
    yield from halve_on_oom(items[:middle], compute, warn, what)
    yield from halve_on_oom(items[middle:], compute, warn, what)


def single_item_too_large() -> OutOfMemory:
    """What is said where there is nothing left to halve."""
    return OutOfMemory("out of memory with a single item in the batch; try --dtype bfloat16, a smaller model or --device cpu")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that a batch did not fit (CUDA or host memory)."""
    return isinstance(error, torch.OutOfMemoryError) or says_out_of_memory(error)


def release_memory() -> None:
    """Returns freed host memory to the system. Batches of ever new shapes leave holes that the C library keeps otherwise: memory would
    creep up with the number of batches. Does nothing where the C library is not glibc."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def bound_kernel_caches() -> None:
    """Lets oneDNN and torch keep few compiled kernels, for work that meets ever new batch shapes and rarely the same again: by default they
    keep a thousand each, one per shape and layer, 3 MiB for every new length in bfloat16. What the user has set stays; of no effect
    once a linear layer has run, so it comes before the model is loaded."""
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(KERNELS_KEPT))


def large_pages(block: Tensor) -> None:
    """Asks Linux for large pages for a large block of memory that nothing was written to yet: streaming through it then misses fewer
    entries of the page table. Advice only, and of no effect on results."""
    page = 2**21
    first, end = -(-block.data_ptr() // page) * page, (block.data_ptr() + block.nbytes) // page * page
    if sys.platform == "linux" and block.device.type == "cpu" and first < end:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), _MADV_HUGEPAGE)
