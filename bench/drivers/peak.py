"""Extracts from N scenario-events or writes N replies, and prints the peak memory of this process: `peak.py extract 48 bfloat16`.

Two figures: of the whole process, and from the loaded model on. Loading peaks high (the file's pages and the weights made of them are
there at once) and would hide whatever the work itself adds.
"""

from __future__ import annotations

import contextlib
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


def forget_peak() -> bool:
    """Starts the kernel's peak anew at what is held now; whether it could."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        return True
    return False


def loaded() -> int:
    """Marks the end of loading: the peak so far, after which it is forgotten where the system can (else later peaks include it)."""
    peak = peak_bytes()
    forget_peak()
    return peak


def extract(size: int, dtype: str) -> int:
    """What `emosteer extract` does; returns the peak of loading."""
    from bench.extraction import runner
    from bench.workload import Workbench, settings
    from emosteer.models.memory import bound_kernel_caches

    bound_kernel_caches()  # as the command does it
    bench = Workbench()
    data = bench.data(size)
    with tempfile.TemporaryDirectory() as folder:
        model = bench.model(dtype)
        before = loaded()
        runner(model, data.groups, data.bank, settings(), Path(folder))()
    return before


def generate(size: int, dtype: str) -> int:
    """What `emosteer generate --input` does: steered replies, written to a file in batches of 32; returns the peak of loading."""
    from bench.workload import Workbench, decoding, endless
    from emosteer.writing.jobs import Job
    from emosteer.writing.reply_files import write_file
    from emosteer.writing.writer import Writer

    bench = Workbench()
    model, circuit = bench.model(dtype), bench.circuit
    writer = Writer(model, circuit, decoding(12), circuit.instruction, "circuit")
    names = circuit.emotions
    groups = [bench.prompts[index % len(bench.prompts)] for index in range(size)]
    jobs = [Job.of(group, names[i % len(names)], "circuit", 1.0) for i, group in enumerate(groups)]
    before = loaded()
    with tempfile.TemporaryDirectory() as folder, endless(model):
        write_file(writer, jobs, Path(folder) / "out.jsonl")
    return before


if __name__ == "__main__":
    loading = {"extract": extract, "generate": generate}[sys.argv[1]](int(sys.argv[2]), sys.argv[3])
    working = peak_bytes()
    print(json.dumps({"whole": max(loading, working), "working": working}))
