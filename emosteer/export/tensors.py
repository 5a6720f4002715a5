"""Safetensors files read and written in pieces, so that memory does not grow with the model.

The usual reader maps whole files into memory and the usual writer wants a whole file's tensors at once. Here a tensor passes
through in pieces of whole rows, and a piece is all that is held.
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emosteer.base.errors import ModelError
from emosteer.base.strict_json import loads

if TYPE_CHECKING:
    from torch import Tensor

#: Bytes of a tensor that are held at a time (a single row may be longer).
PIECE = 32 * 2**20
#: Names of precisions: as safetensors writes them -> as the command line and torch do, and their bytes.
PRECISIONS = {"F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2)}
CODES = {name: code for code, (name, _) in PRECISIONS.items()}


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies. code: of `PRECISIONS`; offset: bytes from the start of the file."""

    file: Path
    offset: int
    code: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * PRECISIONS[self.code][1]


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of a model folder by name; only headers are read.

    Raises:
        ModelError: if a file is damaged, or a tensor is neither float32, float16 nor bfloat16 (quantised weights).
    """
    tensors: dict[str, Stored] = {}
    for file in _weight_files(folder):
        start, header = _header(file)
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] not in PRECISIONS:
                raise ModelError(
                    f"expected weights in float32, float16 or bfloat16, found {name} in {entry['dtype']} in {file}; "
                    "export from the unquantised model"
                )
            tensors[name] = Stored(file, start + entry["data_offsets"][0], entry["dtype"], tuple(entry["shape"]))
    return tensors


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if index.is_file():
        return [folder / name for name in sorted(set(loads(index.read_text("utf-8"))["weight_map"].values()))]
    return sorted(folder.glob("*.safetensors"))


def _header(file: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """The start of the data and the parsed header of a file."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        size = os.fstat(opened.fileno()).st_size
        try:
            if length > size - 8:
                raise ValueError("cut short")
            header = loads(opened.read(length))
            if 8 + length + max((_end(entry) for name, entry in header.items() if name != "__metadata__"), default=0) > size:
                raise ValueError("cut short")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{file} is damaged or no safetensors file ({error}); fetch the model again") from error
    return 8 + length, header


def _end(entry: dict[str, Any]) -> int:
    """Where a tensor ends in its file, by an entry of the header that is whole and says one thing.

    Raises:
        KeyError, TypeError, ValueError: if it is not.
    """
    (begin, end), shape, code = entry["data_offsets"], entry["shape"], entry["dtype"]
    if not all(type(number) is int and number >= 0 for number in (begin, end - begin, *shape)) or not isinstance(code, str):
        raise ValueError("a tensor has no place or no shape")
    if code in PRECISIONS and end - begin != math.prod(shape) * PRECISIONS[code][1]:
        raise ValueError("a tensor has another size than its shape")
    return int(end)


def read_bytes(opened: io.FileIO, size: int) -> bytearray:
    """Reads exactly this many bytes: the only place where weights enter memory.

    Raises:
        ModelError: if the file ends before.
    """
    piece = bytearray(size)
    if opened.readinto(piece) != size:
        raise ModelError(f"{opened.name} is cut short; fetch the model again")
    return piece


def pieces(tensor: Stored) -> Iterator[Tensor]:
    """The tensor in pieces of whole rows, in its own precision; at most two are alive at a time if the caller keeps none."""
    import torch

    dtype = getattr(torch, PRECISIONS[tensor.code][0])
    row = math.prod(tensor.shape[1:]) * PRECISIONS[tensor.code][1]
    left = tensor.shape[0] if tensor.shape else 1
    with tensor.file.open("rb", buffering=0) as opened:
        opened.seek(tensor.offset)
        while left and row:
            rows = min(left, max(1, PIECE // row))
            yield torch.frombuffer(read_bytes(opened, rows * row), dtype=dtype).reshape(rows, *tensor.shape[1:])
            left -= rows


# ---- writing -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planned:
    """A tensor to be written. source: gives its values in pieces, in any precision."""

    name: str
    code: str
    shape: tuple[int, ...]
    source: Callable[[], Iterator[Tensor]]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * PRECISIONS[self.code][1]


def shards(plan: Sequence[Planned], limit: int) -> list[list[Planned]]:
    """Splits a plan, in its order, into files of at most `limit` bytes; a longer tensor gets its own file."""
    files: list[list[Planned]] = [[]]
    size = 0
    for tensor in plan:
        if files[-1] and size + tensor.size > limit:
            files.append([])
            size = 0
        files[-1].append(tensor)
        size += tensor.size
    return files


def write_shard(path: Path, tensors: Sequence[Planned], advance: Callable[[float], None]) -> None:
    """Writes one safetensors file tensor by tensor; `advance` is called with the bytes written.

    Raises:
        ModelError: if values do not fit into the precision. OSError: if the disk is full.
    """
    ordered = sorted(tensors, key=lambda tensor: -PRECISIONS[tensor.code][1])  # wide ones first keeps every tensor aligned
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in ordered:
        header[tensor.name] = {"dtype": tensor.code, "shape": list(tensor.shape), "data_offsets": [end, end + tensor.size]}
        end += tensor.size
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as opened:
        _write(opened, len(text).to_bytes(8, "little") + text)
        for tensor in ordered:
            written = 0
            for piece in tensor.source():
                data = as_bytes(piece, tensor)
                _write(opened, data)
                written += len(data)
                advance(len(data))
                del piece, data  # before the next one is read
            if written != tensor.size:
                raise ModelError(f"expected {tensor.size} bytes of {tensor.name}, found {written}; the model's files do not fit its config")
        os.fsync(opened.fileno())


def _write(opened: io.FileIO, data: bytes | memoryview) -> None:
    """Writes all of it: an unbuffered file may take a part at a time."""
    left = memoryview(data)
    while left:
        done = opened.write(left)
        if not done:
            raise OSError(errno.EIO, "nothing could be written", opened.name)
        left = left[done:]


def as_bytes(piece: Tensor, tensor: Planned) -> memoryview:
    """The piece in the precision that it is to be written in, as bytes.

    Raises:
        ModelError: if a value is too large for it (float16).
    """
    import torch

    wanted = getattr(torch, PRECISIONS[tensor.code][0])
    converted = piece.contiguous() if piece.dtype == wanted else piece.to(wanted)
    if wanted == torch.float16 and piece.dtype != wanted and not torch.isfinite(converted).all():
        raise ModelError(f"{tensor.name} holds values too large for float16; use --dtype bfloat16")
    flat: Any = converted.flatten().view(torch.uint8).numpy()
    return memoryview(flat)
