"""A server under load: are all answered right, how fast, and does anything leak?

    python bench/serving.py                        # 500 requests, 64 at a time, a tenth hangs up; then 2,000 short ones for the memory
    python bench/serving.py --requests 100 --memory-requests 0
    python bench/serving.py --places 32 --texts 348
    python bench/serving.py --texts 348 --direct   # without HTTP and clients: what continuous batching itself costs

Writes the same requests offline first (`generate`, in batches as large as the server's), then starts `emosteer serve` and sends them.
Prints one JSON object: how many texts are the offline ones, tokens per second of both, time to first token, rows and memory afterwards.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

import emosteer
from emosteer.api.steered_model import SteeredModel
from emosteer.circuits.methods import Part as Units
from emosteer.generation.generate import batches
from emosteer.scenarios.shipped import development_groups
from emosteer.serving.asking import Served, chat_asks
from emosteer.serving.metrics import Metrics
from emosteer.serving.requests import ChatRequest
from emosteer.serving.settings import ServeSettings
from emosteer.serving.writer_thread import Part, WriterThread, Writing


@dataclass(frozen=True)
class Load:
    """One request. leaves: after how many pieces its client hangs up, 0 for never."""

    text: str
    emotion: str | None
    intensity: float
    tokens: int
    leaves: int


def loads(
    count: int, emotions: Sequence[str], leaving: float, tokens: Sequence[int] = (16, 32, 48, 64), seed: int = 0, texts: int = 64
) -> list[Load]:
    """Mixed emotions, intensities and lengths. texts: of how many prompts they are drawn."""
    draw = random.Random(seed)
    said = [group.text for group in development_groups(texts).groups if not group.earlier]
    return [
        Load(
            draw.choice(said),
            draw.choice([*emotions, None]),
            draw.choice([30, 50, 70, -40]),
            draw.choice(tokens),
            draw.randrange(1, 6) if draw.random() < leaving else 0,
        )
        for _ in range(count)
    ]


def offline(m: SteeredModel, work: Sequence[Load], places: int) -> tuple[list[str], list[int], float, float]:
    """The texts and tokens of all requests, and the seconds and processor seconds that they took in batches of equal length."""
    texts, counts = [""] * len(work), [0] * len(work)
    begun, worked = time.monotonic(), time.process_time()
    for tokens in sorted({load.tokens for load in work}):
        mine = [i for i, load in enumerate(work) if load.tokens == tokens]
        requests = m._work([work[i].text for i in mine], None, {}).requests
        for part in batches(requests, places):
            index = [mine[i] for i in part]
            replies = m.generate(
                [work[i].text for i in index],
                [work[i].emotion for i in index],
                intensity=[work[i].intensity if work[i].emotion else None for i in index],
                max_new_tokens=tokens,
                batch_size=places,
            )
            for i, reply in zip(index, replies, strict=True):
                texts[i], counts[i] = reply.text, reply.n_tokens
    return texts, counts, time.monotonic() - begun, time.process_time() - worked


@dataclass
class Seen:
    """What came of one request. problem: why it was not answered."""

    text: str = ""
    first: float | None = None
    problem: str = ""


def body_of(model: str, load: Load) -> dict[str, Any]:
    """What a client sends."""
    felt = {"emotion": load.emotion, "intensity": load.intensity} if load.emotion else {}
    return {"model": model, "messages": [{"role": "user", "content": load.text}], "max_tokens": load.tokens, "stream": True, **felt}


def direct(m: SteeredModel, work: Sequence[Load], places: int, at_once: int) -> tuple[list[str], int, float]:
    """The texts of all requests, their tokens, and the processor seconds that the server's writer takes for them in this process. Nobody
    hangs up."""
    assert m.circuit is not None
    writer = WriterThread(m.model, m.circuit.added(Units.UNITS, m.model), ServeSettings(max_batch=places), Metrics())
    served = Served(m.model, m.circuit, m.model.name, ServeSettings.max_tokens, lambda texts: [])
    texts, counts, gate = [""] * len(work), [0] * len(work), threading.Semaphore(at_once)

    def take(index: int, part: Part) -> None:
        assert part.error is None, part.error
        texts[index] += part.text
        counts[index] += len(part.tokens)
        if part.ended:
            gate.release()

    writer.start()
    worked = time.process_time()
    for index, load in enumerate(work):
        gate.acquire()
        [ask] = chat_asks(served, ChatRequest.model_validate(body_of(m.model.name, load))).asks
        writer.submit(Writing(ask, lambda part, index=index: take(index, part)))  # type: ignore[misc]
    for _ in range(at_once):
        gate.acquire()
    worked = time.process_time() - worked
    writer.stop()
    return texts, sum(counts), worked


async def send(client: httpx.AsyncClient, model: str, load: Load, gate: asyncio.Semaphore) -> Seen:
    """One streamed request."""
    seen, pieces = Seen(), 0
    body = body_of(model, load)
    async with gate:
        begun = time.monotonic()
        try:
            async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                if answer.status_code != 200:
                    seen.problem = f"{answer.status_code} {(await answer.aread())[:200]!r}"
                    return seen
                async for line in answer.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    event = json.loads(line.removeprefix("data: "))
                    text = event["choices"][0]["delta"].get("content", "") if "choices" in event else ""
                    seen.problem = json.dumps(event["error"]) if "error" in event else seen.problem
                    if text:
                        seen.first = seen.first or time.monotonic() - begun
                        seen.text += text
                        pieces += 1
                        if load.leaves and pieces >= load.leaves:
                            return seen
        except httpx.HTTPError as error:
            seen.problem = repr(error)
    return seen


async def all_at(url: str, model: str, work: Sequence[Load], at_once: int) -> list[Seen]:
    gate = asyncio.Semaphore(at_once)
    limits = httpx.Limits(max_connections=at_once + 8)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        return await asyncio.gather(*(send(client, model, load, gate) for load in work))


def rss(pid: int) -> float:
    """Memory of a process, in MiB."""
    with open(f"/proc/{pid}/status") as file:
        return int(re.search(r"VmRSS:\s+(\d+)", file.read())[1]) / 1024  # type: ignore[index]


def processor(pid: int) -> float:
    """Processor seconds of a process so far."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def settled(url: str) -> dict[str, Any]:
    """The server's own counts once nobody is written for."""
    for _ in range(200):
        health = httpx.get(url + "/healthz").json()
        if not health["running"] and not health["waiting"]:
            break
        time.sleep(0.05)
    metrics = httpx.get(url + "/metrics").text
    counts = dict(re.findall(r"^(emosteer_rows|emosteer_step_seconds_sum|emosteer_step_seconds_count) (\S+)", metrics, re.M))
    return {**health, "rows": float(counts["emosteer_rows"]), "s in steps": round(float(counts["emosteer_step_seconds_sum"]), 1)}


def quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--at-once", type=int, default=64)
    parser.add_argument("--places", type=int, default=ServeSettings.max_batch, help="replies at a time, offline and in the server")
    parser.add_argument("--texts", type=int, default=64, help="prompts that the requests are drawn from; at most 348")
    parser.add_argument("--memory-requests", type=int, default=2000)
    parser.add_argument("--direct", action="store_true", help="give the requests to the server's writer in this process, without HTTP")
    options = parser.parse_args()
    m = emosteer.load()
    work = loads(options.requests, m.emotions, 0.1, texts=options.texts)
    texts, counts, seconds, worked = offline(m, work, options.places)
    print(f"offline: {sum(counts) / seconds:.0f} tokens/s", file=sys.stderr, flush=True)
    if options.direct:
        found, written, used = direct(m, work, options.places, options.at_once)
        equal = sum(one == other for one, other in zip(found, texts, strict=True))
        rates = sum(counts) / worked, written / used
        names = ("offline tokens per processor s", "writer tokens per processor s", "ratio by processor time")
        figures = dict(zip(names, (round(rates[0], 1), round(rates[1], 1), round(rates[1] / rates[0], 3)), strict=True))
        print(json.dumps({"requests": len(work), "equal to offline": equal, **figures}, indent=1))
        return
    command = [sys.executable, "-m", "emosteer", "serve", "--port", "0", "--max-batch", str(options.places)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ))
    assert server.stdout is not None
    url = str(server.stdout.readline()).split()[2].removesuffix("/v1,")
    try:
        model = httpx.get(url + "/v1/models").json()["data"][0]["id"]
        asyncio.run(all_at(url, model, work[:8], 8))  # warm
        begun, before = time.monotonic(), processor(server.pid)
        seen = asyncio.run(all_at(url, model, work, options.at_once))
        took, used = time.monotonic() - begun, processor(server.pid) - before
        stayed = [i for i, load in enumerate(work) if not load.leaves]
        left = [i for i, load in enumerate(work) if load.leaves]
        firsts = [one.first for one in seen if one.first is not None]
        # those that left were written for as far as their client read: at least as many tokens as pieces
        written = sum(counts[i] for i in stayed) + sum(min(work[i].leaves, counts[i]) for i in left)
        report: dict[str, Any] = {
            "requests": len(work),
            "answered": sum(not one.problem for one in seen),
            "equal to offline": sum(seen[i].text == texts[i] for i in stayed),
            "of": len(stayed),
            "left": len(left),
            "their beginnings equal": sum(texts[i].startswith(seen[i].text.strip()) for i in left),
            "offline tokens/s": round(sum(counts) / seconds, 1),
            "server tokens/s": round(written / took, 1),
            "ratio": round(written / took / (sum(counts) / seconds), 3),
            "offline tokens per processor s": round(sum(counts) / worked, 1),
            "server tokens per processor s": round(written / used, 1),
            "ratio by processor time": round(written / used / (sum(counts) / worked), 3),
            "first token, median s": round(quantile(firsts, 0.5), 2),
            "first token, 95th s": round(quantile(firsts, 0.95), 2),
            "s": round(took, 1),
            "afterwards": settled(url),
            "MiB": [round(rss(server.pid))],
            "problems": [one.problem for one in seen if one.problem][:3],
        }
        for part in range(4 if options.memory_requests else 0):
            short = loads(options.memory_requests // 4, m.emotions, 0.1, (2, 6), seed=part + 1)
            asyncio.run(all_at(url, model, short, options.at_once))
            settled(url)
            report["MiB"].append(round(rss(server.pid)))
        report["in the end"] = settled(url)
        print(json.dumps(report, indent=1))
    finally:
        server.terminate()
        server.wait(60)
        print(f"server ended with {server.returncode}", file=sys.stderr)


if __name__ == "__main__":
    main()
