"""vLLM in a process of its own: one model folder, many prompts as tokens, replies as they end.

It is run as a file, perhaps by the Python of another environment than emosteer's, so it knows the standard library and vllm only.
stdin: one JSON object, the task (see `vllm_engine.Task`). stdout: a JSON object a line: {"ready": seconds} when the model is up,
{"index", "ids", "finish_reason"} for each reply, {"done": seconds} at the end, or {"error": text, "missing": whether there is no vllm}.
Everything that vLLM itself prints goes to stderr.
"""

from __future__ import annotations

import os
import sys

# A file that is run has its folder first among the places of modules: emosteer's own modules would hide others of the same name.
sys.path[:] = [place for place in sys.path if os.path.abspath(place or ".") != os.path.dirname(os.path.abspath(__file__))]

import json  # noqa: E402
import time  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from typing import Any  # noqa: E402


def replies(task: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Loads the folder, writes, and yields what goes to stdout."""
    from vllm import EngineArgs, LLMEngine, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    start = time.monotonic()
    engine = LLMEngine.from_engine_args(EngineArgs(**task["engine"]))
    yield {"ready": round(time.monotonic() - start, 1)}
    start = time.monotonic()
    for index, request in enumerate(task["requests"]):
        params = SamplingParams(**task["sampling"], seed=request["seed"], output_kind=RequestOutputKind.FINAL_ONLY)
        engine.add_request(str(index), {"prompt_token_ids": request["ids"]}, params)
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                reply = output.outputs[0]
                yield {"index": int(output.request_id), "ids": list(reply.token_ids), "finish_reason": reply.finish_reason}
    yield {"done": round(time.monotonic() - start, 2)}


def main() -> int:
    """Reads the task, writes the answers; returns the exit code."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    task = json.load(sys.stdin)
    try:
        for answer in replies(task):
            print(json.dumps(answer), file=stream, flush=True)
    except BaseException as error:
        import traceback

        traceback.print_exc()
        missing = isinstance(error, ModuleNotFoundError) and error.name == "vllm"
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        print(json.dumps({"error": text[:300], "missing": missing}), file=stream, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
