"""What an artefact must hold to be taken: its plain fields by a pydantic model, its tensors by type and shape.

Each kind states its own schema beside its value (`circuits/schema.py` and its like); this module says how a schema is held against a file.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError
from torch import Tensor

from emosteer.base.errors import ArtifactError
from emosteer.base.strict_json import UNPRINTABLE

#: Layers, emotions and neurons of a layer that a file may speak of; well above any model that there is.
MAX_LAYERS, MAX_EMOTIONS, MAX_WIDTH = 4096, 256, 2**20
_TYPES: Mapping[str, tuple[torch.dtype, ...]] = {
    "float": (torch.float32, torch.float64, torch.float16, torch.bfloat16),
    "bool": (torch.bool,),
    "int": (torch.int64,),
}
Checked = TypeVar("Checked")


def _plain(text: str) -> str:
    """Nothing that would steer a terminal, and no half of a character."""
    if UNPRINTABLE.search(text):
        raise PydanticCustomError("plain", "Input should be a text without control characters")
    return text


#: What may stand between the letters of a name, whatever its script (`scenarios.emotions` says how names are spelt).
_JOINING = " -'_\N{MIDDLE DOT}\N{ZERO WIDTH NON-JOINER}\N{ZERO WIDTH JOINER}"


def _names(names: list[str]) -> list[str]:
    for name in names:
        known = all(letter in _JOINING or unicodedata.category(letter)[0] in "LMN" for letter in name)
        if not known or "  " in name or name != name.strip(" ") or not name:
            raise PydanticCustomError("names", "Input should be names of letters, digits, hyphens, apostrophes and single spaces")
    if len(set(names)) < len(names):
        raise PydanticCustomError("unique", "Input should be names that differ from each other")
    return names


def _distinct(values: list[int]) -> list[int]:
    if len(set(values)) < len(values):
        raise PydanticCustomError("distinct", "Input should be numbers that differ from each other")
    return values


Text = Annotated[str, Field(max_length=100_000, strict=True), AfterValidator(_plain)]
#: Stands for a part that may be missing; null is not the same and is refused.
MISSING: Any = None
#: What emotions are called: words that may stand in a table, a file's name or a command.
Names = Annotated[list[Annotated[str, Field(max_length=100)]], Field(min_length=1, max_length=MAX_EMOTIONS), AfterValidator(_names)]
Layer = Annotated[int, Field(ge=0, lt=MAX_LAYERS)]
Layers = Annotated[list[Layer], Field(max_length=MAX_LAYERS), AfterValidator(_distinct)]
Count = Annotated[int, Field(ge=0, le=2**40)]
Share = Annotated[float, Field(ge=0, le=1)]


class Fields(BaseModel):
    """The plain fields of one kind of artefact: no other than these, of exactly these types, all numbers finite."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


class Record(BaseModel):
    """A part of the fields that may hold more than what is read of it."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, frozen=True)


def check_fields(schema: type[Checked], fields: object, path: Path | str, part: str | None = None) -> Checked:
    """Holds plain values against a pydantic model or a dataclass.

    Args:
        part: what is malformed, for messages; None for the fields themselves.

    Raises:
        ArtifactError: naming the file, the first field that is wrong, what was expected and what was found.
    """
    try:
        return TypeAdapter(schema).validate_python(fields)
    except ValidationError as error:
        told = f"has {part} ({_told(error)})" if part else _told(error)
        raise ArtifactError(f"{path} {told}; make it again") from None


def _told(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"]) or "fields"
    if first["type"] in ("missing", "missing_argument"):
        return f"lacks '{place}'"
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"holds a field '{place[:60]}', which has no meaning here"
    wanted = re.sub(r"^(Input|Value) should (be|have|match) ?", "", first["msg"])
    return f"is malformed: expected '{place}' to be {wanted}, found {_shown(first['input'])}"


def _shown(value: object) -> str:
    try:
        text = json.dumps(value, ensure_ascii=True)
    except (TypeError, ValueError):
        text = repr(value)
    return f"{type(value).__name__} {text[:60]}{'...' if len(text) > 60 else ''}"


def check_tensors(tensors: Mapping[str, Tensor], wanted: Mapping[str, str], sizes: Mapping[str, int], path: Path | str) -> dict[str, int]:
    """Holds tensors against types and shapes that must agree with each other.

    Args:
        wanted: name -> type and dimensions, such as "float emotion layer d_model"; a number is a size by itself, a name is the same size
            wherever it stands, and a type that ends in ? may be missing.
        sizes: of dimensions that are known from elsewhere.

    Returns:
        The size of every dimension.

    Raises:
        ArtifactError: naming the file and the first tensor that is missing, not wanted, of another type or shape, or not finite.
    """
    known = dict(sizes)
    if stray := sorted(tensors.keys() - wanted.keys()):
        raise ArtifactError(f"{path} holds a tensor '{stray[0][:60]}', which has no meaning here; make it again")
    for name, told in wanted.items():
        kind, *dimensions = told.split()
        tensor = tensors.get(name)
        if tensor is None:
            if kind.endswith("?"):
                continue
            raise ArtifactError(f"{path} lacks '{name}'; make it again")
        expected = [int(size) if size.isdecimal() else known.get(size, size) for size in dimensions]
        found = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        fits = len(expected) == tensor.ndim and all(isinstance(a, str) or a == b for a, b in zip(expected, tensor.shape, strict=True))
        if tensor.dtype not in _TYPES[kind.rstrip("?")] or not fits:
            shape = ", ".join(map(str, expected))
            raise ArtifactError(f"{path}: expected '{name}' to be {kind.rstrip('?')} [{shape}], found {found}; make it again")
        known |= {size: length for size, length in zip(dimensions, tensor.shape, strict=True) if not size.isdecimal()}
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ArtifactError(f"{path} holds values that are not finite in '{name}'; make it again")
    return known


def check_within(tensor: Tensor, low: float, high: float, name: str, path: Path | str) -> None:
    """Refuses values outside bounds.

    Raises:
        ArtifactError: naming the tensor, the bounds and the first value outside.
    """
    outside = ~((tensor >= low) & (tensor <= high))
    if outside.any():
        value = tensor[outside][0].item()
        raise ArtifactError(f"{path}: expected '{name}' to lie between {low:g} and {high:g}, found {value:g}; make it again")


def check_members(layers: Iterable[int], n_layers: int, name: str, path: Path | str) -> None:
    """Refuses layers that the tensors do not have.

    Raises:
        ArtifactError: naming the first.
    """
    if beyond := [layer for layer in layers if not 0 <= layer < n_layers]:
        raise ArtifactError(f"{path}: expected '{name}' to be layers from 0 to {n_layers - 1}, found {beyond[0]}; make it again")


def check_keys(found: Iterable[str], names: Sequence[str], field: str, path: Path | str) -> None:
    """Refuses a table that does not have exactly one row for each emotion.

    Raises:
        ArtifactError: naming the first that is missing or left over.
    """
    keys = set(found)
    if odd := sorted(keys ^ set(names)):
        what = "no row for" if odd[0] in keys else "a row for"
        raise ArtifactError(f"{path}: expected {what} '{odd[0][:60]}' in '{field}'; make it again")


def check_sizes(found: Mapping[str, int], model: Mapping[str, int], model_name: str, path: Path | str) -> None:
    """Refuses tensors of other sizes than the model's, whatever the file says of the weights that it was made for.

    Raises:
        ArtifactError: naming the first size that differs.
    """
    for name, size in model.items():
        if name in found and found[name] != size:
            raise ArtifactError(f"{path}: expected {name} {size} as in {model_name}, found {found[name]}; make it again for this model")
