"""GGUF files converted to folders that transformers can load: once, into the cache, each file of them named in a manifest.

torch and transformers are imported only while a file is converted.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from emosteer.base.cache_folder import (
    Say,
    cache_dir,
    locked,
    remembered_sha256,
    require_trusted,
    scratch,
    silent,
    stranger_in_cache,
    writing,
)
from emosteer.base.errors import EmosteerError, ModelError, first_line
from emosteer.base.files import sha256_file, write_text
from emosteer.base.strict_json import loads

MANIFEST = "emosteer.json"
#: 2: of files that were proved to hold every tensor; earlier conversions are made again.
SCHEMA = 2


def converted(find: Callable[[Path], Path], sha256: str, name: str, say: Say) -> Path:
    """The converted folder of a GGUF file; `find(folder)` gives the file itself and is called only if it must be converted."""
    folder = cache_dir() / "converted" / sha256[:16]
    require_trusted(folder)
    if not _is_whole(folder, sha256, silent):
        with writing(folder), locked(folder, say):
            if not _is_whole(folder, sha256, say):  # another process may have done it meanwhile
                gguf = find(folder)
                say(f"converting {gguf.name} to safetensors (once)")
                with scratch(folder) as new:
                    _convert(gguf, new)
                    _write_manifest(new, sha256, name)
                    shutil.rmtree(folder, ignore_errors=True)
                    os.rename(new, folder)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    """Writes the weights (float32), tokenizer and chat template of a GGUF file into `folder`.

    Raises:
        ModelError: if it cannot be read as a model. OSError: if the disk is full.
    """
    try:
        with _quiet():
            _load_and_save(gguf, folder)
    except ModelError:
        raise
    except Exception as error:  # a foreign file in the hands of foreign parsers: anything can come
        if isinstance(error, OSError) and error.errno is not None:
            raise
        if "No space left" in str(error):  # safetensors' own error type
            raise OSError(errno.ENOSPC, "disk full", str(folder)) from error
        raise ModelError(
            f"cannot convert {gguf.name}: {first_line(error)}; the file may be cut short, or its architecture unknown"
        ) from error


def _load_and_save(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoTokenizer

    from emosteer.models.weights.whole import load_whole

    link = folder / "model.gguf"  # alone in its folder, so that no stray config or tokenizer beside the GGUF file is mixed in
    try:
        link.symlink_to(gguf.resolve())
    except (OSError, NotImplementedError):  # Windows lets few users make links
        shutil.copyfile(gguf, link)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, gguf_file=link.name)
    model: Any = load_whole(folder, gguf.name, gguf_file=link.name, dtype=torch.float32)
    link.unlink()
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for name in ("is_quantized", "quantization_method", "hf_quantizer"):  # the tensors are plain now; saving refuses these
        model.__dict__.pop(name, None)
    model.config.architectures = [type(model).__name__]  # GGUF files do not carry it
    need = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if shutil.disk_usage(folder).free < need:
        raise OSError(errno.ENOSPC, "disk full", str(folder))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and warnings of transformers. Its GGUF bar heeds no setting, so stderr is held back too."""
    from transformers.utils import logging as untyped

    logging: Any = untyped
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


# ---- the manifest -----------------------------------------------------------------------------------------------


def _write_manifest(folder: Path, sha256: str, name: str) -> None:
    """Names every file with size, sha256 and time. Written last: a folder without one is not finished."""
    entries = {}
    for file in sorted(folder.iterdir()):
        file.chmod(0o644)  # safetensors makes it private; a cache may be shared
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
        entries[file.name] = [file.stat().st_size, sha256_file(file), file.stat().st_mtime_ns]
    folder.chmod(0o755)
    write_text(folder / MANIFEST, json.dumps({"schema": SCHEMA, "gguf_sha256": sha256, "name": name, "files": entries}, indent=1))


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a converted folder; None if there is none or it makes no sense."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        manifest = loads((folder / MANIFEST).read_text("utf-8"))
        shapes = [(type(size), type(sha256), type(time)) for size, sha256, time in manifest["files"].values()]
        named = isinstance(manifest["name"], str) and isinstance(manifest["gguf_sha256"], str)
        if manifest["schema"] == SCHEMA and named and shapes and set(shapes) == {(int, str, int)}:
            return dict(manifest)
    return None


def manifests() -> list[tuple[Path, dict[str, Any]]]:
    """The finished conversions in the cache."""
    folders = sorted((cache_dir() / "converted").glob("[!.]*"))
    return [(folder, manifest) for folder in folders if (manifest := read_manifest(folder)) is not None]


def _is_whole(folder: Path, sha256: str, say: Say) -> bool:
    """Whether a finished conversion is there and undamaged; says what is wrong if it is there but not so."""
    manifest = read_manifest(folder)
    fault = damage(folder, manifest) if manifest and manifest["gguf_sha256"] == sha256 else f"no usable {MANIFEST}"
    if fault and folder.exists():
        say(f"converted model in {folder} is damaged ({fault}): converting again")
    return fault is None


def damage(folder: Path, manifest: dict[str, Any]) -> str | None:
    """The first file that differs from what was written. Contents are read only if the modification time has changed."""
    files: dict[str, list[Any]] = manifest["files"]
    times = {}
    for name, (size, sha256, mtime_ns) in files.items():
        try:
            stat = (folder / name).stat()
        except OSError:
            return f"{name} is missing"
        if stat.st_size != size:
            return f"{name} has {stat.st_size} bytes, expected {size}"
        if stat.st_mtime_ns != mtime_ns:
            if sha256_file(folder / name) != sha256:
                return f"{name} has changed"
            times[name] = [size, sha256, stat.st_mtime_ns]
    if times:  # copied or touched, but the same: the next finding need not read it again
        with contextlib.suppress(EmosteerError):
            write_text(folder / MANIFEST, json.dumps({**manifest, "files": {**files, **times}}, indent=1))
    return None


def ours(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder that is known to be a conversion: one in the cache, or the same bytes as one there. A manifest elsewhere
    came with the folder, and says of itself whatever its maker liked."""
    manifest = read_manifest(folder)
    if manifest is None:
        return None
    inside = cache_dir() / "converted" / manifest["gguf_sha256"][:16]
    if folder.resolve() == inside.resolve():
        require_trusted(folder)
        return manifest if damage(folder, manifest) is None else None
    kept = read_manifest(inside)
    if kept is None or stranger_in_cache(inside) or kept["gguf_sha256"] != manifest["gguf_sha256"] or damage(inside, kept):
        return None
    same = all((folder / name).is_file() and remembered_sha256(folder / name, silent) == sha for name, (_, sha, _) in kept["files"].items())
    return manifest if same else None
