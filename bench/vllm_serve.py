"""Does a stock `vllm serve` of an exported folder say what the built-in engine says, and how fast?

    EMOSTEER_VLLM_PYTHON=VLLM_ENV/bin/python VLLM_CPU_KVCACHE_SPACE=2 python bench/vllm_serve.py
    ... bench/vllm_serve.py --dtype float32 -- --enforce-eager           # options of `vllm serve` follow after --

Exports the model with one emotion, starts the server, asks it with a real OpenAI client for greedy completions of test prompts, stops it,
and has the built-in engine answer the same prompts at the same positions (all), precision and decoding. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from emosteer.base.progress import note
from emosteer.circuits.places import require_circuit
from emosteer.generation.decoding import Decoding
from emosteer.generation.generate import Reply, Request, batches, generate
from emosteer.models.model import Model
from emosteer.models.tokens import reply_text
from emosteer.models.weights import resolve as weights
from emosteer.scenarios.prompts import INSTRUCTION
from emosteer.scenarios.scenarios import Group, data_path, groups_of, read_scenarios
from emosteer.scenarios.splits import spread
from emosteer.serving.vllm_process import find_python
from emosteer.serving.vllm_writer import Served, VllmWriter
from emosteer.writing.jobs import Job, request_of


def builtin(folder: Path, dtype: str, requests: Sequence[Request], decoding: Decoding, batch_size: int) -> tuple[list[Reply], float]:
    """Replies of the built-in engine at all positions, and seconds without loading.

    The exported folder is an ordinary model: with no plan, its biases act wherever vLLM has them act. Where the built-in engine can steer
    all positions itself, this is the one place to change: load the original model and give a plan for all positions.
    """
    model = Model.load(str(folder), device="cpu", dtype=dtype)
    generate(model, requests[:2], decoding=Decoding(max_new_tokens=2))  # what is made once is not timed
    start, found = time.perf_counter(), dict[int, Reply]()
    for index in batches(requests, batch_size):
        found.update(zip(index, generate(model, [requests[i] for i in index], decoding=decoding), strict=True))
    return [found[i] for i in range(len(requests))], time.perf_counter() - start


def test_groups(count: int) -> list[Group]:
    """Test scenario-events, evenly spread."""
    groups = groups_of(read_scenarios(data_path("sev/test.jsonl")))
    return spread(groups, count) if count < len(groups) else groups


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def agreement(one: Sequence[Sequence[int]], two: Sequence[Sequence[int]]) -> dict[str, float]:
    """Of two engines' replies as tokens: share of identical ones, and how far the others go together."""
    prefixes = [common_prefix(a, b) for a, b in zip(one, two, strict=True)]
    longest = [max(len(a), len(b), 1) for a, b in zip(one, two, strict=True)]
    return {
        "identical": sum(list(a) == list(b) for a, b in zip(one, two, strict=True)) / len(one),
        "first_token_alike": sum(prefix > 0 for prefix in prefixes) / len(one),
        "mean_common_prefix_tokens": sum(prefixes) / len(one),
        "mean_common_prefix_share": sum(p / n for p, n in zip(prefixes, longest, strict=True)) / len(one),
    }


@contextlib.contextmanager
def server(python: str, folder: Path, options: Sequence[str], timeout: float, log: Path) -> Iterator[tuple[str, float]]:
    """`vllm serve FOLDER` while the block lasts. Yields its address and how long it took to be healthy."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(python).with_name("vllm")), "serve", str(folder), "--served-model-name", "steered", *options]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    note(f"{' '.join(command)}; its log: {log}")
    environment = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", **os.environ}
    start = time.monotonic()
    with log.open("wb") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
    try:
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200:
                    break
            if process.poll() is not None or time.monotonic() - start > timeout:
                raise SystemExit(f"the server did not come up in {time.monotonic() - start:.0f} s; see {log}")
            time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1", time.monotonic() - start
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with contextlib.suppress(ProcessLookupError):  # what the server started is in its session
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


def ask(python: str, base_url: str, prompts: Sequence[Sequence[int]], warm: Sequence[Sequence[int]], parallel: int, request: Any) -> Any:
    """What a real OpenAI client is answered (vllm_client.py)."""
    task = {"base_url": base_url, "prompts": prompts, "warm": warm, "parallel": parallel, "request": request}
    command = [python, str(Path(__file__).with_name("vllm_client.py"))]
    done = subprocess.run(command, input=json.dumps(task), stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--emotion", default="sadness")
    parser.add_argument("--strength", type=float)
    parser.add_argument("--circuit", type=Path)
    parser.add_argument("--dtype", default="bfloat16", help="of both engines")
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--repetition-penalty", type=float, default=1.1)
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for the server to come up")
    parser.add_argument("--log", type=Path, default=Path("vllm_serve.log"))
    parser.add_argument("serve", nargs="*", help="options of `vllm serve`, after --")
    options = parser.parse_args()
    decoding = Decoding(options.max_new_tokens, 0.0, 1.0, options.repetition_penalty)
    python, found = find_python(), weights.resolve(options.model, progress=note)
    served, (circuit, path) = Served.of(found, options.dtype), require_circuit(found, options.circuit)
    strength = circuit.default_strength(options.emotion) if options.strength is None else options.strength
    writer = VllmWriter(served, (circuit, path), decoding, INSTRUCTION, "circuit")
    folder = writer.checkpoint(options.emotion, strength)
    groups = test_groups(options.prompts + 4)
    jobs = [Job.of(group, options.emotion, "circuit", strength) for group in groups]
    requests = [request_of(served, job, INSTRUCTION) for job in jobs]
    warm, requests = [list(request.ids) for request in requests[:4]], requests[4:]
    request = {
        "model": "steered",
        "temperature": 0,
        "top_p": 1,
        "max_tokens": decoding.max_new_tokens,
        "extra_body": {
            "repetition_penalty": decoding.repetition_penalty,
            "stop_token_ids": sorted(served.stop_ids),
            "top_k": 0,
            "return_token_ids": True,
        },
    }
    flags = ["--dtype", options.dtype, "--max-model-len", "1024", "--max-num-seqs", str(options.batch_size), *options.serve]
    with server(python, folder, flags, options.timeout, options.log) as (address, boot):
        note(f"the server is up after {boot:.0f} s")
        said = ask(python, address, [list(r.ids) for r in requests], warm, options.batch_size, request)
    theirs = [[i for i in reply["ids"] if i not in served.stop_ids] for reply in said["replies"]]
    replies, seconds = builtin(folder, options.dtype, requests, decoding, options.batch_size)
    ours = [list(reply.ids) for reply in replies]
    differs = next((i for i, (a, b) in enumerate(zip(theirs, ours, strict=True)) if a != b), None)
    result = {
        "model": found.name,
        "emotion": options.emotion,
        "strength": strength,
        "dtype": options.dtype,
        "positions": "all",
        "prompts": len(requests),
        "batch_size": options.batch_size,
        "boot_seconds": round(boot, 1),
        **agreement(theirs, ours),
        "vllm": {"tokens": sum(map(len, theirs)), "tokens_per_second": round(sum(map(len, theirs)) / said["seconds"], 1)},
        "builtin": {"tokens": sum(map(len, ours)), "tokens_per_second": round(sum(map(len, ours)) / seconds, 1)},
        "first_difference": None if differs is None else [reply_text(served.tokenizer, side[differs]) for side in (theirs, ours)],
    }
    print(json.dumps(result, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
