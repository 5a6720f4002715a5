"""Where the shipped data lie. No torch here."""

from __future__ import annotations

from pathlib import Path

from emosteer.base.errors import DataError


def data_path(name: str) -> Path:
    """Path of a file of the shipped data (``sev/train.jsonl``): inside an installed package or beside it in a checkout.

    Raises:
        DataError: if it is in neither place.
    """
    here = Path(__file__).parent.parent
    for root in (here / "data", here.parent / "data"):
        if (root / name).exists():
            return root / name
    raise DataError(f"the shipped data file {name} is missing; install emosteer again")
