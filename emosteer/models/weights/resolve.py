"""Where weights come from: a packaged default, a GGUF file, a local folder or a hub id; converted once, cached, checked.

The cache holds `converted/<GGUF sha256>/` (safetensors, tokenizer and a manifest), `encoders/<sha256>/` and `downloads/` (model
folders and GGUF files out of packages) and `hashes.json` (sha256 of big files by path, size and modification time). A finding
that is warm reads a few small files: huggingface_hub is imported only for hub ids, torch only while a GGUF file is converted.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from emosteer.base.cache_folder import Say, cache_dir, locked, remembered_sha256, require_trusted, silent, writing
from emosteer.base.errors import ModelError, first_line, suggest
from emosteer.base.files import write_error
from emosteer.models.weights import packages
from emosteer.models.weights.gguf import MANIFEST, converted, damage, manifests, ours
from emosteer.models.weights.model_folder import folder_sha256, gap
from emosteer.models.weights.packages import ENCODERS, PACKAGED, Packaged

__all__ = ["ENCODERS", "MODEL_FORMS", "MANIFEST", "PACKAGED", "KnownModel", "Packaged", "Weights"]
__all__ += ["cache_dir", "known", "packaged_folder", "pull", "resolve"]

MODEL_FORMS = "a packaged name (smollm2-135m), a hub id (org/name), a folder with config.json or a .gguf file"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_HUB_FILES = ["*.safetensors", "*.json", "tokenizer*", "*.model", "*.jinja", "vocab.txt", "merges.txt"]


@dataclass(frozen=True)
class Weights:
    """A local folder that transformers can load.

    sha256: of the weights, wherever the folder lies. source: "packaged", "gguf", "folder" or "hub". reference: what the user wrote.
    """

    name: str
    path: Path
    sha256: str
    source: str
    reference: str = field(default="", compare=False)


@dataclass(frozen=True)
class KnownModel:
    """One line of `models list`. path: None until it is here. ready: needs no download and no conversion. size: bytes."""

    name: str
    source: str
    path: Path | None
    ready: bool
    size: int


# ---- finding -----------------------------------------------------------------------------------------------------


def resolve(reference: str, *, progress: Say | None = None) -> Weights:
    """Finds the weights a user named; downloads and converts them first where that is needed.

    Args:
        reference: a packaged name (these win over a folder of the same name; write `./name` for the folder), a GGUF file, a
            folder, the name of a GGUF file converted before, or a hub id.
        progress: called with one line before anything slow.

    Raises:
        ModelError: if they cannot be found, fetched, converted or trusted, or the cache cannot be written.
    """
    return replace(_resolve(reference, progress or silent), reference=reference)


def gguf_file(reference: str, *, progress: Say | None = None) -> Path | None:
    """The GGUF file that a reference means: itself, the one in a folder, or a packaged model's. None if it means none.

    Raises:
        ModelError: if a packaged model cannot be fetched.
    """
    path = Path(reference).expanduser()
    with _readable(reference):
        if model := _packaged().get(reference.lower()):
            place, say = cache_dir() / "downloads" / model.file, progress or silent
            with writing(place), locked(place, say):
                return packages.packaged_file(model, place, say)
        if path.is_dir() and not (path / "config.json").is_file():
            files = sorted(path.glob("*.gguf"))
            return files[0] if len(files) == 1 else None
        return path if path.suffix == ".gguf" and path.is_file() else None


def _packaged() -> dict[str, Packaged]:
    return {alias.lower(): model for model in PACKAGED for alias in (model.name, *model.aliases)}


def _resolve(reference: str, say: Say) -> Weights:
    packaged = _packaged()
    with _readable(reference):
        if model := packaged.get(reference.lower()):
            path = converted(lambda folder: packages.packaged_file(model, folder, say), model.sha256, model.name, say)
            return Weights(model.name, path, model.sha256, "packaged")
        path = Path(reference).expanduser()
        if reference.strip() and path.is_dir():
            return _from_folder(path.absolute(), say)
        if path.is_file() or path.suffix == ".gguf":
            return _from_gguf(path.absolute(), say)
        if _HUB_ID.fullmatch(reference):
            return _from_hub(reference, say)
        return _from_name(reference, list(packaged))


def pull(reference: str, *, progress: Say | None = None) -> Weights:
    """Makes the weights ready for use offline: the same as `resolve`, under the name that the command line gives it."""
    return resolve(reference, progress=progress)


def packaged_folder(name: str, *, progress: Say | None = None) -> Weights:
    """Finds a sentence encoder that travels in a package (`ENCODERS`); downloads it first where that is needed.

    Raises:
        ModelError: if there is none of this name, it cannot be fetched or trusted, or the cache cannot be written.
    """
    item = next((item for item in ENCODERS if item.name == name.lower()), None)
    if item is None:
        names = [item.name for item in ENCODERS]
        raise ModelError(f"unknown sentence encoder '{name}'{suggest(name, names)}; expected {' or '.join(names)}")
    with _readable(name):
        return Weights(item.name, packages.packaged_folder(item, progress or silent), item.sha256, "packaged")


@contextlib.contextmanager
def _readable(reference: str) -> Iterator[None]:
    """Turns trouble with reading into one line."""
    try:
        yield
    except OSError as error:
        raise ModelError(f"cannot read the weights of {reference}: {error.filename or ''} {error.strerror or error}") from error


def known() -> list[KnownModel]:
    """What can be named without a path: packaged models, GGUF files converted before, models in the local hub cache."""
    done = {manifest["gguf_sha256"]: (folder, manifest) for folder, manifest in manifests()}
    rows = []
    for model in PACKAGED:
        here = done.pop(model.sha256, None)
        rows.append(_row(model.name, "packaged", *here) if here else KnownModel(model.name, "packaged", None, False, model.size))
    rows += [_row(manifest["name"], "gguf", folder, manifest) for folder, manifest in done.values()]
    return rows + _hub_models()


def _row(name: str, source: str, folder: Path, manifest: dict[str, Any]) -> KnownModel:
    """A converted model, judged by its files' sizes alone: a listing reads no weights."""
    sizes = {file: size for file, (size, _, _) in manifest["files"].items()}
    ready = all((folder / file).is_file() and (folder / file).stat().st_size == size for file, size in sizes.items())
    return KnownModel(name, source, folder, ready, sum(sizes.values()))


def _from_name(reference: str, names: list[str]) -> Weights:
    """A plain word: the name of a GGUF file converted before, or an error."""
    matches = [(folder, manifest) for folder, manifest in manifests() if manifest["name"] == reference]
    if len(matches) == 1:
        folder, manifest = matches[0]
        require_trusted(folder)
        if fault := damage(folder, manifest):
            raise ModelError(f"the converted {reference} is damaged ({fault}); give the path of its GGUF file to convert it again")
        return Weights(reference, folder, manifest["gguf_sha256"], "gguf")
    if matches:
        raise ModelError(f"{len(matches)} converted GGUF files are called '{reference}'; give the path of the one you want")
    names = list(dict.fromkeys([*names, *(manifest["name"] for _, manifest in manifests())]))
    what = "unknown model" if "/" not in reference else "no such file or folder"
    raise ModelError(f"{what} '{reference}'{suggest(reference, names)}; expected {MODEL_FORMS}")


# ---- folders, files and the hub -----------------------------------------------------------------------------------------


def _from_folder(path: Path, say: Say) -> Weights:
    if not (path / "config.json").is_file():
        files = sorted(path.glob("*.gguf"))
        if len(files) == 1:
            return _from_gguf(files[0], say)
        hint = f"it holds {len(files)} GGUF files: name one of them" if files else f"give {MODEL_FORMS}"
        raise ModelError(f"expected a model folder with config.json, found none in {path}; {hint}")
    if manifest := ours(path):  # the same weights, so the same hash
        return Weights(manifest["name"], path, manifest["gguf_sha256"], "gguf")
    if lack := gap(path):
        raise ModelError(f"model folder {path} cannot be used: {lack}")
    return Weights(path.resolve().name, path, folder_sha256(path, say), "folder")


def _from_gguf(path: Path, say: Say) -> Weights:
    if not path.exists():
        raise ModelError(f"GGUF file {path} does not exist; check the path")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"expected a GGUF file, found something else in {path}; give {MODEL_FORMS}")
    sha256 = remembered_sha256(path, say)
    return Weights(path.stem, converted(lambda _: path, sha256, path.stem, say), sha256, "gguf")


def _from_hub(repo: str, say: Say) -> Weights:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    folder: Path | None = None
    # Only config.json is asked for: whether the rest is there is judged by `gap`, since the hub's own check would go back to the
    # network for files that are not needed.
    with contextlib.suppress(LocalEntryNotFoundError):
        folder = Path(snapshot_download(repo, local_files_only=True, allow_patterns=["config.json"]))
    if folder is None or gap(folder):
        say(f"fetching {repo} from the Hugging Face hub")
        try:  # weights in subfolders and `consolidated` copies are the same weights in other formats
            folder = Path(snapshot_download(repo, allow_patterns=_HUB_FILES, ignore_patterns=["*/*", "consolidated*"]))
        except Exception as error:  # the hub's client lets through errors of its HTTP libraries, which change between versions
            raise _hub_error(repo, error) from error
        if lack := gap(folder):
            raise ModelError(f"{repo} cannot be used: {lack} after fetching it; check the network, or choose a repository with safetensors")
    return Weights(repo, folder, folder_sha256(folder, say), "hub")


def _hub_error(repo: str, error: Exception) -> ModelError:
    from huggingface_hub import errors as hub

    if isinstance(error, hub.GatedRepoError):
        return ModelError(f"{repo} is gated: accept its licence at https://huggingface.co/{repo}, then run `hf auth login`")
    if isinstance(error, hub.RepositoryNotFoundError):
        return ModelError(f"{repo} is neither a folder here nor on the hub; check the name (or `hf auth login`, if it is private)")
    if isinstance(error, (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled)):
        forms = "a folder with config.json, a .gguf file or smollm2-135m"
        return ModelError(f"{repo} is not complete in the local hub cache and the hub cannot be reached; go online, or use {forms}")
    if isinstance(error, OSError) and error.errno is not None:
        return ModelError(str(write_error(Path(error.filename or "the hub cache"), error)))
    return ModelError(f"cannot fetch {repo} from the hub: {first_line(error)}")


def _hub_models() -> list[KnownModel]:
    from huggingface_hub import constants  # reads the environment; light

    rows = []
    for repo in sorted(Path(constants.HF_HUB_CACHE).glob("models--*--*")):
        with contextlib.suppress(OSError):
            folder = repo / "snapshots" / (repo / "refs" / "main").read_text("utf-8").strip()
            size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
            name = repo.name.removeprefix("models--").replace("--", "/")
            rows.append(KnownModel(name, "hub", folder, gap(folder) is None, size))
    return rows
