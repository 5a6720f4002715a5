"""A circuit as a plain Hugging Face folder: its vectors are the biases of `o_proj` and `down_proj`.

Any engine that serves Llama serves such a folder. The biases act at every position, the prompt's included.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emosteer.base.cache_folder import megabytes, scratch
from emosteer.base.errors import EmosteerError, ModelError, UsageError
from emosteer.base.files import write_error
from emosteer.base.progress import bar, note
from emosteer.base.strict_json import loads
from emosteer.export.card import card
from emosteer.export.forms import ARCHITECTURES, llama_form, read_config
from emosteer.export.tensors import CODES, PRECISIONS, Planned, Stored, pieces, shards, stored_tensors, write_shard
from emosteer.export.vectors import LAYERS, WRITERS, ExportRequest, compiled
from emosteer.models.architecture import LLAMA
from emosteer.models.sites import Site

#: Names what a folder is, for people and for `--force`, which replaces nothing else.
FACTS = "emosteer_export.json"
#: Files of a model folder that hold no weights and stay true.
_COPIED = (
    *("tokenizer*", "*.jinja", "chat_template.json", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("generation_config.json", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*"),
)
_PROJECTIONS = (*LLAMA.qkv, LLAMA.w_o, *LLAMA.gate_up, LLAMA.w_down)
_NORMS = (LLAMA.attn_norm, LLAMA.mlp_norm)
_EMBEDDING = f"{LLAMA.body}.{LLAMA.embedding}.weight"
_FINAL_NORM = f"{LLAMA.body}.{LLAMA.final_norm}.weight"
_UNEMBEDDING = f"{LLAMA.unembedding}.weight"
#: Buffers that old checkpoints contain and every engine recomputes.
_BUFFERS = re.compile(r"rotary_emb\.inv_freq$|self_attn\.(masked_)?bias$")


@dataclass(frozen=True, eq=False)
class Biases:
    """The biases that carry the circuit. values: weight's name without its end -> [d_model], float32, the model's own bias included.

    rounding: the largest error that writing them in the folder's precision makes, as a share of the largest value.
    """

    values: Mapping[str, Tensor]
    rounding: float


def export_checkpoint(
    steering: ExportRequest, out: Path, *, precision: str = "auto", shard_size: int = 2 * 10**9, force: bool = False
) -> dict[str, Any]:
    """Writes the folder: whole, or not at all.

    Args:
        precision: of the weights; "auto" leaves each as it is.
        shard_size: bytes of a weights file.
        force: replace an earlier export.

    Returns:
        The facts that also stand in the folder's `emosteer_export.json`.

    Raises:
        UsageError: if `out` is there already. ModelError: if the model cannot carry biases. EmosteerError: if the disk is full.
    """
    refuse(out, force)
    folder = steering.model.path
    config, stored = read_config(folder), stored_tensors(folder)
    form = llama_form(config, _name(precision, stored))
    check_names(stored, form)
    note("computing the biases")
    biases = bias_values(stored, compiled(stored, steering), precision)
    plan = planned(stored, biases, form, precision)
    files = shards(plan, shard_size)
    facts = {
        "schema": 1,
        "kind": "checkpoint",
        **steering.facts(),
        "architecture": ARCHITECTURES[config.model_type],
        "dtype": form["dtype"],
        "bias_rounding": biases.rounding,
        "bytes": sum(tensor.size for tensor in plan),
        "shards": len(files),
        "largest_shard": max(sum(tensor.size for tensor in file) for file in files),
    }
    try:
        with new_folder(out, facts["bytes"]) as new:
            _write_weights(new, files, facts["bytes"])
            copy_plain_files(folder, new, config)
            _write_json(new / "config.json", form)
            (new / "README.md").write_text(card(facts, note_of_circuit(steering)), "utf-8")
            _write_json(new / FACTS, facts)
    except OSError as error:
        raise write_error(out, error) from error
    return {"out": str(out), **facts}


def note_of_circuit(steering: ExportRequest) -> str:
    """What the circuit is made of, in a line."""
    units = steering.circuit.units(steering.emotion)
    heads = sum(str(unit).count("H") for unit in units)
    return f"{heads} attention heads and {len(units) - heads} neurons"


def refuse(out: Path, force: bool) -> None:
    """Refuses a place that holds something else.

    Raises:
        UsageError: if there is anything but, with `force`, an earlier export.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir():
        raise UsageError(f"expected a new folder as --out, found the file {out}")
    if not (out / FACTS).is_file():
        raise UsageError(f"--out {out} holds something that is no export of emosteer; choose another folder")
    if not force:
        raise UsageError(f"--out {out} holds an earlier export; add --force to replace it")


# ---- what is written ---------------------------------------------------------------------------------------------


def _name(precision: str, stored: Mapping[str, Stored]) -> str:
    """The precision that config.json names: of most of the weights."""
    if precision != "auto":
        return precision
    sizes: dict[str, int] = {}
    for tensor in stored.values():
        sizes[tensor.code] = sizes.get(tensor.code, 0) + tensor.size
    return PRECISIONS[max(sizes, key=lambda code: sizes[code])][0]


def check_names(stored: Mapping[str, Stored], form: Mapping[str, Any]) -> None:
    """Proves that the folder holds just the weights of a Llama.

    Raises:
        ModelError: naming the first that is missing or has no place.
    """
    layers = range(form["num_hidden_layers"])
    needed = {f"{LAYERS}.{n}.{part}.weight" for n in layers for part in (*_PROJECTIONS, *_NORMS)}
    needed |= {_EMBEDDING, _FINAL_NORM} | (set() if form["tie_word_embeddings"] else {_UNEMBEDDING})
    allowed = needed | {_UNEMBEDDING} | {f"{LAYERS}.{n}.{part}.bias" for n in layers for part in _PROJECTIONS}
    if missing := sorted(needed - stored.keys()):
        raise ModelError(f"the model folder lacks {len(missing)} weights of a Llama ({missing[0]}); fetch the model again")
    if strange := sorted(name for name in stored.keys() - allowed if not _BUFFERS.search(name)):
        raise ModelError(f"the model folder holds {len(strange)} weights that the Llama form has no place for ({strange[0]})")


def bias_values(stored: Mapping[str, Stored], vectors: Mapping[Site, Tensor], precision: str) -> Biases:
    """The biases of `o_proj` and `down_proj` where the circuit adds something, and what rounding does to them."""
    values: dict[str, Tensor] = {}
    error = largest = 0.0
    for site, vector in vectors.items():
        stem = f"{LAYERS}.{site.layer}.{WRITERS[site.kind]}"
        stored_bias = stored.get(f"{stem}.bias")
        value = vector if stored_bias is None else vector + torch.cat([piece.float() for piece in pieces(stored_bias)])
        dtype = getattr(torch, _dtype(stored[f"{stem}.weight"], precision))
        error = max(error, (value.to(dtype).float() - value).abs().max().item())
        largest = max(largest, value.abs().max().item())
        values[stem] = value
    return Biases(values, error / largest if largest else 0.0)


def _dtype(tensor: Stored, precision: str) -> str:
    return PRECISIONS[tensor.code][0] if precision == "auto" else precision


def planned(stored: Mapping[str, Stored], biases: Biases, form: Mapping[str, Any], precision: str) -> list[Planned]:
    """All tensors of the folder in the order of the model: the model's own, and a bias for every linear map."""
    plan: list[Planned] = []
    for name in (_EMBEDDING, *_layer_names(form["num_hidden_layers"]), _FINAL_NORM, _UNEMBEDDING):
        stem, end = name.rsplit(".", 1)
        tensor, weight = stored.get(name), stored.get(f"{stem}.weight")
        if weight is None:  # a tied lm_head
            continue
        code = CODES[_dtype(weight, precision)]
        if end == "bias" and (stem in biases.values or tensor is None):
            shape = weight.shape[:1]
            plan.append(Planned(name, code, shape, _constant(biases.values.get(stem), shape)))
        elif tensor is not None:
            plan.append(Planned(name, code, tensor.shape, functools.partial(pieces, tensor)))
    return plan


def _layer_names(n_layers: int) -> Iterator[str]:
    for layer in range(n_layers):
        for part in (*_PROJECTIONS, *_NORMS):
            yield f"{LAYERS}.{layer}.{part}.weight"
            if part in _PROJECTIONS:
                yield f"{LAYERS}.{layer}.{part}.bias"


def _constant(value: Tensor | None, shape: tuple[int, ...]) -> Any:
    return lambda: iter([torch.zeros(shape) if value is None else value])


# ---- the folder --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def new_folder(out: Path, need: int) -> Iterator[Path]:
    """A scratch folder beside `out` that takes its place when the block ends without an exception.

    Raises:
        EmosteerError: if the disk has fewer than `need` bytes left.
    """
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if free < need:
        raise EmosteerError(f"cannot write {out}: it takes {megabytes(need)}, the disk has {megabytes(free)}; free some space")
    with scratch(out) as new:
        yield new
        for file in new.iterdir():
            file.chmod(0o644)
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        new.chmod(0o755)
        with scratch(out) as old:
            if out.exists():
                os.rename(out, old / "replaced")
            os.rename(new, out)


def _write_weights(folder: Path, files: list[list[Planned]], total: int) -> None:
    names = ["model.safetensors"] if len(files) == 1 else [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    with bar("export (MB)", total / 1e6) as advance:
        for name, tensors in zip(names, files, strict=True):
            write_shard(folder / name, tensors, lambda done: advance(done / 1e6))
    if len(files) > 1:
        where = {tensor.name: name for name, tensors in zip(names, files, strict=True) for tensor in tensors}
        _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})


def copy_plain_files(source: Path, target: Path, config: Any) -> None:
    """Tokenizer, chat template, generation settings and licence texts, as they are.

    Which class reads a tokenizer depends on the model type too; where that has become Llama, the class that reads the source is
    written down, so that the same text gives the same tokens.
    """
    for pattern in _COPIED:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, target / file.name)
    if config.model_type == "llama":
        return
    from transformers import AutoTokenizer

    settings = target / "tokenizer_config.json"
    tokenizer_config = loads(settings.read_text("utf-8")) if settings.is_file() else {}
    name = type(AutoTokenizer.from_pretrained(source, local_files_only=True)).__name__
    if name == "TokenizersBackend":  # the general class, which transformers 4 knows by another name
        name = tokenizer_config.get("tokenizer_class") or "PreTrainedTokenizerFast"
    _write_json(settings, {**tokenizer_config, "tokenizer_class": name})


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
