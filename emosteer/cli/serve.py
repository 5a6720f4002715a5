"""`emosteer serve`: a server that any OpenAI client can use, and the playground."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from emosteer.base.errors import UsageError
from emosteer.circuits.places import ARTIFACTS
from emosteer.cli.options import DEFAULT_MODEL, DeviceMapOption, DeviceOption, DtypeOption, ModelOption, RootOption
from emosteer.generation.decoding import MAX_TOKENS
from emosteer.serving.settings import KEY_VARIABLE, ServeSettings

#: What the extra brings.
_NEEDED = ("starlette", "uvicorn", "pydantic", "prometheus_client")


def serve(
    model: ModelOption = DEFAULT_MODEL,
    circuit: Annotated[Path | None, typer.Option(help="Circuit file; else artifacts/, else the shipped one.", metavar="FILE")] = None,
    auto: Annotated[bool, typer.Option("--auto", help="Make directions and circuit first where they are missing.")] = False,
    host: Annotated[str, typer.Option(help="Where to listen; other than this machine only with an API key.")] = ServeSettings.host,
    port: Annotated[int, typer.Option(max=65_535, help="0 takes a free one.")] = ServeSettings.port,
    api_key: Annotated[
        str | None,
        typer.Option(help="What clients must bring. Better in the environment: command lines can be seen.", envvar=KEY_VARIABLE),
    ] = None,
    cors: Annotated[
        list[str] | None, typer.Option(help="Origin whose pages may call the server; may be repeated.", metavar="ORIGIN")
    ] = None,
    max_batch: Annotated[int, typer.Option(max=10_000, help="Replies written at once.")] = ServeSettings.max_batch,
    max_queue: Annotated[
        int, typer.Option(max=1_000_000, help="Replies that may wait; more are refused with 429.")
    ] = ServeSettings.max_queue,
    max_tokens: Annotated[int, typer.Option(max=MAX_TOKENS, help="Longest reply, in tokens.")] = ServeSettings.max_tokens,
    max_body: Annotated[int, typer.Option(max=2**30, help="Longest request, in bytes.")] = ServeSettings.max_body,
    timeout: Annotated[float, typer.Option(help="Seconds from a request's arrival to its last token.")] = ServeSettings.timeout,
    grace: Annotated[float, typer.Option(help="Seconds that running replies have once it is told to stop.")] = ServeSettings.grace,
    cache_gb: Annotated[float, typer.Option(help="Memory for keys and values, in GiB.")] = ServeSettings.cache_gb,
    judge: Annotated[str, typer.Option(help="Who reads replies in the playground, and users for a personality.")] = ServeSettings.judge,
    engine: Annotated[str, typer.Option(help="builtin; docs/SERVING.md says when to leave it for vLLM.")] = "builtin",
    device: DeviceOption = "auto",
    device_map: DeviceMapOption = None,
    dtype: DtypeOption = "auto",
    root: RootOption = ARTIFACTS,
) -> None:
    """Serve a steered model to any OpenAI client: /v1/chat/completions, /v1/completions, /v1/models, /v1/emotions, and the playground at /.

    A request says what to feel ("emotion", "intensity", "mix", "arc"), or its model does: NAME:anger@60. docs/SERVING.md has the rest.
    """
    if engine != "builtin":
        raise UsageError(f"unknown engine '{engine}'; expected builtin. docs/SERVING.md says how vLLM serves exported circuits")
    lacking = [name for name in _NEEDED if find_spec(name) is None]
    if lacking:
        raise UsageError(f"serving needs {', '.join(lacking)}; install it with: pip install 'emosteer[serve]'")
    settings = ServeSettings(
        host, port, api_key, tuple(cors or ()), max_batch, max_queue, max_tokens, max_body, timeout, grace, cache_gb, judge
    )
    from emosteer.api.making import ensure_circuit
    from emosteer.circuits.places import require_circuit
    from emosteer.models.model import Model
    from emosteer.serving import run

    run.listen(settings).close()  # an address that is taken is said before the model is loaded
    loaded = Model.load(model, device=device, dtype=dtype, device_map=device_map)
    found = ensure_circuit(loaded, circuit, root, lambda: loaded) if auto else require_circuit(loaded, circuit, root)
    run.serve(loaded, found[0], settings, lambda address: typer.echo(f"{loaded.name} at {address}/v1, playground at {address}/"))
