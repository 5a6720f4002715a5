"""Weights that are whole: a model is used only if every tensor of it was read, and every tensor of its files was used.

transformers fills what a file lacks with random numbers and leaves out what a model has no place for, in both cases without an error;
the replies still look like text. Here either is refused by name, as are quantised weights that this machine cannot unpack. Code that comes
with a model is never run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from emosteer.base.errors import ModelError, first_line, says_out_of_memory
from emosteer.base.progress import note
from emosteer.base.strict_json import loads

#: Names of tensors that a message shows.
SHOWN = 3


def load_whole(folder: Path, name: str, **options: Any) -> Any:
    """The causal language model of a folder, or of a GGUF file in it (`gguf_file`), once it is sure that nothing was made up.

    Args:
        name: what it is called, for messages; options: of `from_pretrained`.

    Raises:
        ModelError: if tensors are missing, left over or of another shape, or quantised in a way that cannot be loaded here. Otherwise what
            transformers raises.
    """
    packed = packed_by(folder, name)
    if packed and "quantization_config" in options:
        raise ModelError(f"{name} is quantised already ({packed}); leave --dtype to a precision of the computation, or out")
    try:
        model, info = _load_attending(folder, name, options)
    except Exception as error:  # of a package that unpacks weights: anything can come
        if packed is None or says_out_of_memory(error):
            raise
        raise ModelError(
            f"{name} is quantised ({packed}), which cannot be loaded here: {first_line(error)}; give the model that it was made from, "
            "a GGUF file of it, or a dequantised copy (model.dequantize().save_pretrained(FOLDER))"
        ) from error
    require_whole(info, name)
    return model


def _load_attending(folder: Path, name: str, options: Mapping[str, Any]) -> tuple[Any, Mapping[str, Any]]:
    """As `_load`, with fused attention where the model has it."""
    try:
        return _load(folder, options)
    except ValueError as error:
        if options.get("attn_implementation") != "sdpa" or "scaled_dot_product_attention" not in str(error):
            raise
    note(f"{name} has no fused attention in transformers: its attention is computed step by step (eager), which is slower")
    return _load(folder, {**options, "attn_implementation": "eager"})


def _load(folder: Path, options: Mapping[str, Any]) -> tuple[Any, Mapping[str, Any]]:
    """The model, and what transformers says of the load. Sizes are compared by `require_whole`, which can name both; code that comes with a
    model is never run and never asked for."""
    from transformers import AutoModelForCausalLM

    how = {"local_files_only": True, "trust_remote_code": False, "output_loading_info": True, "ignore_mismatched_sizes": True}
    model, info = AutoModelForCausalLM.from_pretrained(folder, **how, **options)
    return model, info


def packed_by(folder: Path, name: str) -> str | None:
    """How the weights of a folder are quantised, by its config.json; None where they are plain numbers.

    Raises:
        ModelError: if config.json cannot be read.
    """
    path = folder / "config.json"
    if not path.is_file():  # a GGUF file, whose numbers are unpacked when it is converted
        return None
    try:
        config = loads(path.read_text("utf-8"))
    except (ValueError, OSError) as error:
        raise ModelError(f"cannot load {name}: {path} cannot be read ({first_line(error)})") from error
    if not isinstance(config, dict):
        raise ModelError(f"cannot load {name}: expected an object in {path}, found {type(config).__name__}")
    return scheme_of(config)


def scheme_of(config: Any) -> str | None:
    """How a model's weights are quantised, in a word ("int8", "nf4", else the method's own name); None where they are plain.

    Args:
        config: of the model, as transformers holds it or as config.json spells it.
    """
    packed = config.get("quantization_config") if isinstance(config, Mapping) else getattr(config, "quantization_config", None)
    if not packed:
        return None
    if not isinstance(packed, Mapping):
        packed = packed.to_dict() if hasattr(packed, "to_dict") else {}
    if packed.get("load_in_8bit"):
        return "int8"
    if packed.get("load_in_4bit"):
        return str(packed.get("bnb_4bit_quant_type", "fp4"))
    method = packed.get("quant_method", "an unknown method")
    return str(getattr(method, "value", method))


def require_whole(info: Mapping[str, Any], name: str) -> None:
    """Refuses a load that left something out or made something up.

    Args:
        info: what transformers says of a load; tied weights and buffers that it knows are not in it.

    Raises:
        ModelError: naming the first tensors.
    """
    missing, unused = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    misshapen = sorted((key, tuple(found), tuple(wanted)) for key, found, wanted in info["mismatched_keys"])
    if misshapen:
        key, found, wanted = misshapen[0]
        raise ModelError(
            f"{name} is not whole: {key} has shape {_shape(found)}, but its config.json asks for {_shape(wanted)}{_more(misshapen, 1)}"
        )
    if missing:
        raise ModelError(
            f"{name} is not whole: its files lack {_named(missing)}, which would be random numbers; get all files of the model, and "
            "check that config.json is theirs"
        )
    if unused:
        raise ModelError(
            f"{name} is not what its config.json says: its files hold {_named(unused)}, for which the model has no place; check that "
            "config.json is theirs"
        )
    if info.get("error_msgs"):
        raise ModelError(f"{name} cannot be loaded whole: {str(info['error_msgs'][0]).splitlines()[0]}")


def require_finite(model: Any, name: str) -> None:
    """Refuses weights that are no numbers: one of them makes every reply empty.

    Raises:
        ModelError: naming the first tensor.
    """
    import torch

    for key, value in model.named_parameters():
        if not value.is_meta and not torch.isfinite(value).all():
            count, kind = int((~torch.isfinite(value)).sum()), str(value.dtype).removeprefix("torch.")
            why = "they may be too large for float16: try --dtype bfloat16" if value.dtype == torch.float16 else "the file is damaged"
            raise ModelError(f"{name} has {count} weights that are not finite in {key} ({kind}); {why}")


def _named(keys: Sequence[str]) -> str:
    return f"{', '.join(keys[:SHOWN])}{_more(keys)}"


def _more(keys: Sequence[Any], shown: int = SHOWN) -> str:
    return f" and {len(keys) - shown} more" if len(keys) > shown else ""


def _shape(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes)) or "()"
