"""Options of another engine than ours, as `emosteer generate` takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from emosteer.base.errors import UsageError, suggest
from emosteer.base.strict_json import loads

ENGINES = ("builtin", "vllm")


def engine_options(engine: str, given: Sequence[str] | None, device: str, device_map: str | None) -> dict[str, Any]:
    """NAME=VALUE of vLLM, values as JSON where they are, else as text.

    Raises:
        UsageError: for an unknown engine, or options that it does not take.
    """
    if engine not in ENGINES:
        raise UsageError(f"unknown engine '{engine}'{suggest(engine, ENGINES)}; expected {' or '.join(ENGINES)}")
    if engine == "builtin":
        if given:
            raise UsageError("--engine-option has no meaning with the built-in engine; it belongs to --engine vllm")
        return {}
    if device != "auto" or device_map is not None:
        raise UsageError("--device and --device-map have no meaning with --engine vllm; choose GPUs with CUDA_VISIBLE_DEVICES")
    options: dict[str, Any] = {}
    for item in given or ():
        name, equals, value = item.partition("=")
        if not (equals and name.isidentifier()):
            raise UsageError(f"expected --engine-option NAME=VALUE, such as tensor_parallel_size=4, found '{item}'")
        try:
            options[name] = loads(value.lower() if value in ("True", "False") else value)
        except ValueError:
            options[name] = value
    return options
