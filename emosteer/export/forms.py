"""Which models can carry a circuit as biases, and their configuration in the Llama form, which has a place for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from emosteer.base.errors import ModelError, first_line

#: Model types that are a Llama but for biases and names: type -> class.
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "mistral": "MistralForCausalLM"}
CARRIERS = "Llama, Qwen2/2.5 and Mistral (without sliding-window attention)"
_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "rope_parameters",
    "attention_dropout",
)


def read_config(folder: Path) -> Any:
    """The configuration of a model folder.

    Raises:
        ModelError: if it cannot be read, or its weights are quantised.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot read the configuration in {folder}: {first_line(error)}") from error
    if getattr(config, "quantization_config", None):
        raise ModelError(f"the weights in {folder} are quantised; export from the unquantised model")
    return config


def llama_form(config: Any, precision: str) -> dict[str, Any]:
    """The configuration of the same model as a Llama with biases at every linear map.

    Args:
        precision: "float32", "bfloat16" or "float16", of the weights that will be written.

    Raises:
        ModelError: listing the architectures that can carry biases, if this one cannot.
    """
    names = getattr(config, "architectures", None) or [ARCHITECTURES.get(config.model_type)]
    if config.model_type not in ARCHITECTURES or ARCHITECTURES[config.model_type] != names[0]:
        raise ModelError(f"{names[0] or config.model_type} has no place for the biases; a checkpoint can be made of {CARRIERS}")
    if sliding(config):
        raise ModelError(f"this model attends in sliding windows, which the Llama form has not; a checkpoint can be made of {CARRIERS}")
    values = {name: getattr(config, name, None) for name in _FIELDS}
    values["head_dim"] = values["head_dim"] or config.hidden_size // config.num_attention_heads
    values["num_key_value_heads"] = values["num_key_value_heads"] or config.num_attention_heads
    form = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": True,
        "mlp_bias": True,
        **values,
        "dtype": precision,
        "torch_dtype": precision,  # for readers older than transformers 5, as are the two below
    }
    rope = values["rope_parameters"] or {}
    if "rope_theta" in rope:
        form["rope_theta"] = rope["rope_theta"]
    if rope.get("rope_type", "default") != "default":
        form["rope_scaling"] = rope
    return form


def sliding(config: Any) -> bool:
    """Whether any layer attends in a window."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return any(kind != "full_attention" for kind in kinds)
    return getattr(config, "sliding_window", None) is not None
