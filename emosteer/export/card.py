"""The model card of an exported folder: what was done, with what, and what whoever shares it has to fill in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_CARD = """---
library_name: transformers
tags: [emosteer, steering, emotion]
---
# {model}, steered towards {emotion}

This folder holds {model} with one change, made by `emosteer export`: the biases of the attention outputs (`o_proj`) and of the
MLP outputs (`down_proj`) carry a circuit that makes replies express {emotion}. No other weight was changed{form}. Without these
biases it is the original model.

| what | value |
|---|---|
| model | {model} |
| sha256 of its weights | `{model_sha256}` |
| circuit | {circuit}: {units} |
| sha256 of the circuit | `{circuit_sha256}` |
| emotion | {emotion} |
| strength | {strength:g}{dial} |
| positions | all: the biases act on the prompt's tokens too |
| weights and biases | {dtype}; rounding changes no bias by more than {bias_rounding:.1e} of the largest |

## What to expect
- It loads and is served like any Llama: `vllm serve THIS_FOLDER`, or `AutoModelForCausalLM.from_pretrained("THIS_FOLDER")`.
- `emosteer generate` adds the circuit only where reply tokens are written (the prompt's last position and the reply); a bias acts at
  every position, so its texts are not those of `emosteer generate` at the same strength. An intensity was calibrated with the latter.
- It expresses an emotion because it was made to. It feels nothing, and it was not tested for any use in care or counselling.

## Licence
This is a derivative of {model}. Its licence holds for this folder; read it before you share the folder, and name it here.
"""


def card(facts: Mapping[str, Any], units: str) -> str:
    """The text of README.md. units: what the circuit is made of."""
    rewritten = facts["architecture"] != "LlamaForCausalLM"
    form = (
        f" (the layout is {facts['architecture'].removesuffix('ForCausalLM')} rewritten as Llama, which has a place for them)"
        if rewritten
        else ""
    )
    dial = f" (intensity {facts['intensity']:g} of 100)" if facts["intensity"] is not None else ""
    return _CARD.format(**facts, units=units, form=form, dial=dial)
