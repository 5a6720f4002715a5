"""Extracts from N scenario-events or writes N replies, and prints the peak memory of this process: `peak.py extract 48 bfloat16`."""

from __future__ import annotations

import json
import resource
import sys
import tempfile
from pathlib import Path


def peak_bytes() -> int:
    """Peak resident memory of this process since it became this program.

    Linux counts what the parent held into getrusage's figure when a process is started from a large one, so /proc is asked first.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def extract(size: int, dtype: str) -> None:
    """What `emosteer extract` does, without reading the whole data where less is asked for."""
    from bench.extraction import runner
    from bench.workload import Workbench, settings

    bench = Workbench()
    data = bench.data(size)
    with tempfile.TemporaryDirectory() as folder:
        runner(bench.model(dtype), data.groups, data.bank, settings(), Path(folder))()


def generate(size: int, dtype: str) -> None:
    """What `emosteer generate --input` does: steered replies, written to a file in batches of 32."""
    from bench.workload import Workbench, decoding, endless
    from emosteer.writing import Job, Writer, write_file

    bench = Workbench()
    model, circuit = bench.model(dtype), bench.circuit
    writer = Writer(model, circuit, decoding(12), circuit.instruction, "circuit")
    names = circuit.emotions
    groups = [bench.prompts[index % len(bench.prompts)] for index in range(size)]
    jobs = [Job.of(group, names[i % len(names)], "circuit", 1.0) for i, group in enumerate(groups)]
    with tempfile.TemporaryDirectory() as folder, endless(model):
        write_file(writer, jobs, Path(folder) / "out.jsonl")


if __name__ == "__main__":
    {"extract": extract, "generate": generate}[sys.argv[1]](int(sys.argv[2]), sys.argv[3])
    print(json.dumps({"peak_bytes": peak_bytes()}))
