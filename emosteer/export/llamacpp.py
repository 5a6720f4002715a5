"""A circuit for llama.cpp: as a control vector for any GGUF file of the model, or inside a GGUF model as biases.

A control vector is added to the residual stream after a layer (`direction.N` after layer N, counted from 0; llama.cpp has none for
layer 0). What a circuit adds to the attention output of a layer thus arrives after the layer's MLP, which does not see it, and what
it adds in layer 0 arrives after layer 1: an approximation. The biases of a GGUF model are exact.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from emosteer.base.errors import ModelError, UsageError, first_line
from emosteer.base.files import atomic_path, slug
from emosteer.base.progress import note
from emosteer.export.forms import read_config
from emosteer.export.tensors import stored_tensors
from emosteer.export.vectors import ExportRequest, compiled
from emosteer.models.sites import ATTN_OUT, MLP_OUT, Site
from emosteer.models.weights.resolve import gguf_file

#: Model types whose sublayers write straight into the residual stream -> what llama.cpp calls them.
HINTS = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
#: llama.cpp architectures that can become a GGUF model with biases, which only `llama` has a place for.
CARRIERS = ("llama", "qwen2")
_BIASES = {ATTN_OUT: "attn_output", MLP_OUT: "ffn_down"}


def residual_form(vectors: Mapping[Site, Tensor], n_layers: int, d_model: int) -> Tensor:
    """The circuit as what is added after each layer from layer 1 on; layer 0's share is added after layer 1.

    Returns:
        [n_layers - 1, d_model]; row 0 belongs to layer 1.
    """
    after = torch.zeros(n_layers, d_model)
    for site, vector in vectors.items():
        after[max(site.layer, 1)] += vector
    return after[1:]


def target(out: Path, steering: ExportRequest, end: str, force: bool) -> Path:
    """The file to write: `out` itself if it is called so, else one in the folder `out`.

    Raises:
        UsageError: if it is there already.
    """
    path = out if out.suffix == ".gguf" else out / f"{slug(steering.model.name)}-{steering.emotion}{end}.gguf"
    if path.is_dir():
        raise UsageError(f"expected a file as --out, found the folder {path}")
    if path.exists() and not force:
        raise UsageError(f"--out {path} exists; add --force to replace it")
    return path


def export_control_vector(steering: ExportRequest, out: Path, *, force: bool = False) -> dict[str, Any]:
    """Writes a control vector; returns its facts.

    Raises:
        UsageError: if the file exists. ModelError: if a control vector cannot stand for what is added in this architecture.
    """
    import gguf

    path = target(out, steering, "-vector", force)
    config = read_config(steering.model.path)
    hint, n_layers = vector_hint(config), config.num_hidden_layers
    vectors = compiled(stored_tensors(steering.model.path), steering)
    after = residual_form(vectors, n_layers, config.hidden_size)
    with atomic_path(path) as temporary:
        writer = gguf.GGUFWriter(temporary, "controlvector")
        writer.add_string("controlvector.model_hint", hint)
        writer.add_int32("controlvector.layer_count", len(after))
        _add_facts(writer, steering)
        for layer, vector in enumerate(after, 1):
            writer.add_tensor(f"direction.{layer}", np.ascontiguousarray(vector.numpy()))
        _write(writer)
    facts = {"schema": 1, "kind": "gguf", **steering.facts(), "architecture": hint, "layers": [1, n_layers - 1]}
    return {"out": str(path), **facts}


def vector_hint(config: Any) -> str:
    """What llama.cpp calls the architecture that a control vector is made for.

    Raises:
        ModelError: if what is added to the stream after a layer cannot stand for what its sublayers are made to write.
    """
    hint = HINTS.get(config.model_type)
    if hint is None or getattr(config, "num_hidden_layers", 0) < 2:
        raise ModelError(
            f"no control vector can be made for {config.model_type}; expected one of {', '.join(HINTS)} with two layers or more"
        )
    return hint


def export_gguf_model(steering: ExportRequest, out: Path, *, force: bool = False) -> dict[str, Any]:
    """Writes the model's own GGUF file once more with the circuit as biases: metadata and quantised tensors as they are.

    Raises:
        UsageError: if the file exists. ModelError: if the model did not come as a GGUF file, or cannot carry biases.
    """
    import gguf

    path = target(out, steering, "", force)
    source = gguf_file(steering.model.reference, progress=note)
    if source is None:
        name = shlex.quote(steering.model.reference)
        raise ModelError(
            f"{steering.model.name} did not come as a GGUF file (expected --model FILE.gguf); make a checkpoint with `emosteer export "
            f"--to checkpoint --model {name} ...` and give it to llama.cpp's own convert_hf_to_gguf.py"
        )
    try:
        reader = gguf.GGUFReader(source)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise ModelError(f"cannot read {source}: {first_line(error)}") from error
    old = _text(reader, "general.architecture")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if old not in CARRIERS or any("_exps" in name for name in tensors):
        raise ModelError(f"llama.cpp has no place for the biases in {old}; a GGUF model can be made of {', '.join(CARRIERS)} (no experts)")
    if reader.get_field("split.count") is not None and _number(reader, "split.count") > 1:
        raise ModelError(f"{source} is one of several parts; merge them with llama.cpp's llama-gguf-split first")
    biases = _biases(tensors, compiled(stored_tensors(steering.model.path), steering))
    with atomic_path(path) as temporary:
        writer = gguf.GGUFWriter(temporary, "llama")
        _copy_metadata(reader, writer, old)
        _add_facts(writer, steering)
        _copy_tensors(reader, writer, biases, old)
    facts = {
        "schema": 1,
        "kind": "gguf-model",
        **steering.facts(),
        "architecture": old,
        "biases": len(biases),
        "bytes": path.stat().st_size,
    }
    return {"out": str(path), **facts}


# ---- reading and writing -------------------------------------------------------------------------------------------


def _text(reader: Any, key: str) -> str:
    field = reader.get_field(key)
    return str(field.contents()) if field is not None else ""


def _number(reader: Any, key: str) -> int:
    field = reader.get_field(key)
    return int(field.contents()) if field is not None else 0


def _add_facts(writer: Any, steering: ExportRequest) -> None:
    """What was done, under keys of our own, which llama.cpp passes over."""
    for key, value in steering.facts().items():
        if isinstance(value, str):
            writer.add_string(f"emosteer.{key}", value)
        elif value is not None:
            writer.add_float32(f"emosteer.{key}", float(value))


def _biases(tensors: Mapping[str, Any], vectors: Mapping[Site, Tensor]) -> dict[str, np.ndarray[Any, Any]]:
    """Name of a bias -> its values, the model's own included. Every layer gets both, as some readers ask for all or none."""
    from gguf.quants import dequantize

    biases = {}
    layers = sorted({int(name.split(".")[1]) for name in tensors if name.startswith("blk.")})
    for layer in layers:
        for kind, part in _BIASES.items():
            weight, name = tensors.get(f"blk.{layer}.{part}.weight"), f"blk.{layer}.{part}.bias"
            if weight is None:
                raise ModelError(f"the GGUF file holds no blk.{layer}.{part}.weight; expected decoder layers of the Llama shape")
            value = np.zeros(int(weight.shape[1]), np.float32)
            if (vector := vectors.get(Site(layer, kind))) is not None:
                value = value + vector.numpy()
            if (stored_bias := tensors.get(name)) is not None:
                value = value + dequantize(stored_bias.data, stored_bias.tensor_type)
            biases[name] = value
    return biases


def _copy_metadata(reader: Any, writer: Any, old: str) -> None:
    """All keys of the source; those of the architecture under the name `llama`."""
    import gguf

    for key, field in reader.fields.items():
        if key.startswith(("GGUF.", "emosteer.")) or key == "general.architecture" or not field.types:
            continue
        name = f"llama.{key.removeprefix(f'{old}.')}" if key.startswith(f"{old}.") else key
        array = field.types[0] == gguf.GGUFValueType.ARRAY
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=field.types[-1] if array else None)
    if alignment := _number(reader, "general.alignment"):
        writer.data_alignment = alignment


def _copy_tensors(reader: Any, writer: Any, biases: Mapping[str, np.ndarray[Any, Any]], old: str) -> None:
    """One tensor after the other, as stored; nothing is requantised."""
    heads = {"attn_q": _number(reader, f"{old}.attention.head_count"), "attn_k": _number(reader, f"{old}.attention.head_count_kv")}
    heads["attn_k"] = heads["attn_k"] or heads["attn_q"]
    kept = [tensor for tensor in reader.tensors if tensor.name not in biases]
    for tensor in kept:
        writer.add_tensor_info(tensor.name, tensor.data.shape, tensor.data.dtype, tensor.data.nbytes, tensor.tensor_type)
    for name, value in biases.items():
        writer.add_tensor_info(name, value.shape, value.dtype, value.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in kept:
        part = tensor.name.split(".")[-2] if "." in tensor.name else ""
        data = paired_rows(tensor.data, heads[part]) if old != "llama" and part in heads else tensor.data
        writer.write_tensor_data(data)
    for value in biases.values():
        writer.write_tensor_data(value)
    writer.close()


def paired_rows(data: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows of a query or key matrix (or its bias) in the order that llama.cpp's `llama` rotates them in.

    Rotary embeddings turn pairs of rows: (i, i + d_head / 2) in most architectures, (2 i, 2 i + 1) in `llama`. Rows are quantised one by
    one, so they can change places as they are.
    """
    order = np.arange(len(data)).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)
    return np.ascontiguousarray(data[order])


def _write(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
