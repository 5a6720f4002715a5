"""Asks an OpenAI-compatible server with the OpenAI client; run by the Python of the environment that has it (see vllm_serve.py).

stdin: {"base_url", "prompts" (token ids), "warm" (as many prompts to be asked first), "parallel", "request" (of completions.create)}.
stdout: {"replies": [{"ids", "text", "finish_reason"}], "seconds"}, in the order of the prompts.
"""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from openai import OpenAI


def main() -> None:
    task = json.load(sys.stdin)
    client = OpenAI(base_url=task["base_url"], api_key="none", timeout=1800, max_retries=0)

    def ask(ids: list[int]) -> dict[str, Any]:
        choice = client.completions.create(prompt=ids, **task["request"]).choices[0]
        return {"ids": getattr(choice, "token_ids", None), "text": choice.text, "finish_reason": choice.finish_reason}

    with ThreadPoolExecutor(task["parallel"]) as pool:
        list(pool.map(ask, task["warm"]))
        start = time.perf_counter()
        replies = list(pool.map(ask, task["prompts"]))
        seconds = time.perf_counter() - start
    print(json.dumps({"replies": replies, "seconds": seconds}))


if __name__ == "__main__":
    main()
