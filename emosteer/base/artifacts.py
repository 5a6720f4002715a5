"""Artefacts: safetensors files whose JSON header says what they are and where they came from.

Written atomically, read back only after every check has passed. Nothing here unpickles anything.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch
from pydantic import ConfigDict, Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from emosteer import __version__
from emosteer.base.errors import ArtifactError
from emosteer.base.files import atomic_path, sha256_file
from emosteer.base.schema import Fields, Text, check_fields
from emosteer.base.strict_json import Malformed, loads

#: Raised by one whenever a reader of the previous schema would misread a file.
SCHEMA_VERSION = 1
_HEADER_KEY = "emosteer"


@dataclass(frozen=True)
class Provenance:
    """Where an artefact came from: enough to make it again.

    model: name, sha256 of the weights, dtype and device used. template_sha256: the chat template's text.
    data: file name -> sha256. method: what was done. params: how. parents: artefact kind -> sha256 of the file.
    command: what makes it again in a shell; None where no command line made it (functions called from Python: their params say all), and
    in files of versions that did not keep it.
    """

    model: Text
    model_sha256: Text
    template_sha256: Text
    method: Text
    params: dict[str, Any] = field(default_factory=dict)
    seed: Annotated[int, Field(strict=True)] = 0
    data: dict[Text, Text] = field(default_factory=dict)
    parents: dict[Text, Text] = field(default_factory=dict)
    versions: dict[Text, Text] = field(default_factory=dict)
    command: Text | None = None
    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    def record(self) -> dict[str, Any]:
        """As it stands in a file: no key for a command that is not known."""
        return {name: value for name, value in asdict(self).items() if name != "command" or value is not None}

    def origin(self) -> dict[str, Any]:
        """What keys of kept progress are made from: how a thing was made counts, not with which versions or how the command was put."""
        return {name: value for name, value in asdict(self).items() if name != "command"} | {"versions": None}


class Header(Fields):
    """What the JSON header of every artefact holds; `fields` are checked by the schema of the kind."""

    schema_: Annotated[str, Field(alias="schema", pattern=r"^emosteer/[a-z -]+$")]
    schema_version: int
    fields: dict[str, Any]
    provenance: Provenance


class Identified(Protocol):
    """What says which weights are meant: a loaded `Model`, or the `Weights` that one would be loaded from.

    reference: what the user called them, for commands in messages.
    """

    @property
    def name(self) -> str: ...

    @property
    def sha256(self) -> str: ...

    @property
    def reference(self) -> str: ...


def versions() -> dict[str, str]:
    """Versions of what computes: Python and the numerical packages."""
    packages = ("torch", "transformers", "transformer-lens", "safetensors")
    return {"emosteer": __version__, "python": platform.python_version(), **{name: metadata.version(name) for name in packages}}


@dataclass(frozen=True, eq=False)
class Artifact:
    """A loaded file: `kind` ("directions", "scores", "circuit"), `fields` (plain JSON), `tensors`, provenance."""

    kind: str
    fields: dict[str, Any]
    tensors: dict[str, Tensor]
    provenance: Provenance
    path: Path
    sha256: str


def save(path: Path, kind: str, fields: Mapping[str, Any], tensors: Mapping[str, Tensor], provenance: Provenance) -> None:
    """Writes an artefact atomically. The same content gives the same bytes.

    Raises:
        EmosteerError: if the place cannot be written.
    """
    header = {"schema": f"emosteer/{kind}", "schema_version": SCHEMA_VERSION, "fields": dict(fields), "provenance": provenance.record()}
    clean = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    with atomic_path(path) as temporary:
        try:
            save_file(clean, temporary, metadata={_HEADER_KEY: json.dumps(header, sort_keys=True, ensure_ascii=False)})
        except SafetensorError as error:  # its Rust side reports a full disk as text, not as an OSError
            raise OSError(28 if "No space" in str(error) else 5, str(error)) from error


def load_fields(path: Path, kind: str) -> dict[str, Any] | None:
    """The plain fields of an artefact without its tensors; None where it is missing, damaged or of another kind."""
    try:
        with safe_open(Path(path), framework="pt") as file:
            header = loads((file.metadata() or {}).get(_HEADER_KEY, "{}"))
    except (SafetensorError, OSError, ValueError):
        return None
    fields = header.get("fields") if isinstance(header, dict) and header.get("schema") == f"emosteer/{kind}" else None
    return fields if isinstance(fields, dict) else None


def load(path: Path, kind: str | None = None) -> Artifact:
    """Reads an artefact, or refuses with one line.

    Args:
        kind: the kind that the caller needs; None takes any.

    Raises:
        ArtifactError: if the file is missing, truncated, a pickle, not an emosteer artefact, of another kind or schema.
    """
    path = Path(path)
    if not path.is_file():
        raise ArtifactError(f"artefact {path} does not exist" + ("; it is a directory" if path.is_dir() else "; check the path"))
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror or error}") from error
    # safetensors begins with the length of its header, which may look like a pickle's first bytes; the header begins with a brace
    if start[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05") and start[8:] != b"{":
        raise ArtifactError(f"{path} is a pickle (torch.save or the like); emosteer reads only safetensors, because a pickle can run code")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_HEADER_KEY)
            names = list(file.keys())
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} is damaged or not a safetensors file ({error}); make it again") from error
    if text is None:
        raise ArtifactError(f"{path} is a safetensors file but not an emosteer artefact: it has no '{_HEADER_KEY}' header")
    return _checked(path, text, tensors, kind)


def _checked(path: Path, text: str, tensors: dict[str, Tensor], kind: str | None) -> Artifact:
    try:
        header = loads(text)
    except Malformed as error:
        raise ArtifactError(f"{path} has a malformed emosteer header ({error}); make it again") from error
    found = check_fields(Header, header, path, "a malformed emosteer header")
    made_kind, version, fields, provenance = found.schema_.removeprefix("emosteer/"), found.schema_version, found.fields, found.provenance
    if kind is not None and made_kind != kind:
        raise ArtifactError(f"expected an artefact of kind '{kind}', found '{made_kind}' in {path}")
    if version != SCHEMA_VERSION:
        raise ArtifactError(f"{path} has schema version {version}, this emosteer reads version {SCHEMA_VERSION}; make it again")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ArtifactError(f"{path} holds values that are not finite in '{name}'; make it again")
    return Artifact(made_kind, fields, tensors, provenance, path, sha256_file(path))


def require_model(provenance: Provenance, model_sha256: str, model_name: str, path: Path | str) -> None:
    """Refuses an artefact that was made for other weights.

    Raises:
        ArtifactError: if the weights' hashes differ.
    """
    if provenance.model_sha256 != model_sha256:
        raise ArtifactError(
            f"{path} was made for {provenance.model} (weights {provenance.model_sha256[:12]}), "
            f"not for {model_name} (weights {model_sha256[:12]}); run `emosteer extract --model ...` for this model"
        )
