"""Small results of several processes, piece by piece: each piece a file, written by whoever claimed it and read by all."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from emosteer.base import artifacts
from emosteer.base.artifacts import Provenance
from emosteer.base.processes import Crew

KIND = "piece"
_BLANK = Provenance(model="", model_sha256="", template_sha256="", method=KIND)


def gather(
    crew: Crew, folder: Path | None, name: str, fingerprint: str, count: int, compute: Callable[[int], Mapping[str, Tensor]]
) -> list[Mapping[str, Tensor]]:
    """The pieces 0 to count - 1, in order, in every process. Those that an earlier run left in the folder are not computed again.

    Args:
        folder: where several processes keep the pieces; a single one needs none.
        fingerprint: a hash of everything that the pieces depend on.
    """
    if crew.alone:
        return [compute(index) for index in range(count)]
    if folder is None:
        raise ValueError("several processes need a folder to meet at")
    files = [folder / f"{name}-{index}.safetensors" for index in range(count)]
    for index in crew.claim(range(count)):
        if (artifacts.load_fields(files[index], KIND) or {}).get("fingerprint") != fingerprint:
            artifacts.save(files[index], KIND, {"fingerprint": fingerprint}, compute(index), _BLANK)
    crew.meet()
    return [artifacts.load(file, KIND).tensors for file in files]


def clear(folder: Path) -> None:
    """Removes the pieces once their result is saved."""
    shutil.rmtree(folder, ignore_errors=True)
