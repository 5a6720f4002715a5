"""Checkpoints made on demand and kept: one per model, circuit, emotion, strength and precision, in the cache folder."""

from __future__ import annotations

import json
from pathlib import Path

from emosteer.base.cache_folder import cache_dir, locked, writing
from emosteer.base.files import sha256_file, sha256_text, slug
from emosteer.base.progress import note
from emosteer.base.strict_json import loads
from emosteer.export.checkpoint import FACTS, export_checkpoint
from emosteer.export.vectors import ExportRequest

#: Raised by one whenever an earlier export is no longer what this version would write.
VERSION = 1


def cached_checkpoint(steering: ExportRequest, precision: str) -> Path:
    """The exported folder; written first where it is not there yet, or not whole.

    Args:
        precision: "float32", "bfloat16" or "float16".

    Raises:
        ModelError: if the model cannot carry biases. EmosteerError: if the cache cannot be written or the disk is full.
    """
    parts = [
        VERSION,
        steering.model.sha256,
        sha256_file(steering.model.path / "config.json"),
        sha256_file(steering.path),
        steering.emotion,
        steering.strength,
        precision,
    ]
    key = sha256_text(json.dumps(parts))[:16]
    folder = cache_dir() / "exports" / f"{slug(steering.model.name)}-{steering.emotion}-{key}"
    with writing(folder), locked(folder, note):
        if not _whole(folder):
            note(f"exporting {steering.model.name} with {steering.emotion} at strength {steering.strength:g} -> {folder}")
            export_checkpoint(steering, folder, precision=precision, force=True)
    return folder


def _whole(folder: Path) -> bool:
    """Whether an export is there with all its weights, judged by their size."""
    try:
        facts = loads((folder / FACTS).read_text("utf-8"))
        return sum(file.stat().st_size for file in folder.glob("*.safetensors")) >= int(facts["bytes"])
    except (OSError, ValueError, KeyError):
        return False
