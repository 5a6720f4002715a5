"""Model folders: what one lacks to be loaded, and the hash of its weights."""

from __future__ import annotations

import hashlib
from pathlib import Path

from emosteer.base.cache_folder import Say, remembered_sha256
from emosteer.base.strict_json import loads


def gap(folder: Path) -> str | None:
    """What a model folder lacks to be loaded, if anything. Links whose target is gone count as missing."""
    if not (folder / "config.json").is_file():
        return "config.json is missing"
    index = folder / "model.safetensors.index.json"
    if index.is_file() and not (folder / "model.safetensors").is_file():
        try:
            shards = set(loads(index.read_text("utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            return f"{index.name} is damaged"
        # files elsewhere would be loaded, and are not in the hash by which a model is known
        if not shards or not all(isinstance(name, str) and name and Path(name).name == name for name in shards):
            return f"{index.name} names no weight files, or some that are not in the folder itself"
        if missing := sorted(name for name in shards if not (folder / name).is_file()):
            return f"{len(missing)} of {len(shards)} weight files are missing ({missing[0]})"
    elif not any(file.is_file() for file in folder.glob("*.safetensors")):
        pickled = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
        why = f" (found {pickled[0].name}; emosteer reads only safetensors, because a pickle can run code)" if pickled else ""
        return f"no *.safetensors weights{why}"
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    return None if any((folder / name).is_file() for name in names) else "tokenizer files are missing"


def folder_sha256(folder: Path, say: Say) -> str:
    """SHA-256 over the names and hashes of the safetensors files, in the order of the names."""
    lines = [f"{file.name} {remembered_sha256(file, say)}\n" for file in sorted(folder.glob("*.safetensors"))]
    return hashlib.sha256("".join(lines).encode("utf-8")).hexdigest()
