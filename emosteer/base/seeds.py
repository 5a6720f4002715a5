"""Seeds: any whole number that a user gives, made one that a generator takes."""

from __future__ import annotations

import hashlib


def seed_of(seed: int, key: str) -> int:
    """A row's own seed, 63 bits: whatever the batch, the neighbours and the engine."""
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def torch_seed(seed: int) -> int:
    """A seed that torch takes: the seed itself, or a hash of one that is too large."""
    return seed if -(2**63) <= seed < 2**63 else seed_of(seed, "torch")
