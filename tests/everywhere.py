"""The suite as other processors run it: `make test-everywhere`, or `python tests/everywhere.py [PYTEST OPTIONS]`.

Six runs: what this processor has, no more than AVX2, and no more than SSE, each on one thread and on two, in one of three random orders.
Each library has a variable of its own for the instructions that it may use. Ends at the first run that fails, with its exit status.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

LEVELS: dict[str, dict[str, str]] = {
    "native": {},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "sse": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
}
THREADS = (1, 2)
SEEDS = (1, 2, 3)


def main(options: list[str]) -> int:
    """Runs pytest for every combination."""
    for seed, (threads, level) in zip(itertools.cycle(SEEDS), itertools.product(THREADS, LEVELS), strict=False):
        count = {"EMOSTEER_TEST_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
        settings = LEVELS[level] | count | {"OMP_WAIT_POLICY": "PASSIVE"}  # threads that wait for work leave the processor to others
        # pyproject.toml turns the plugin off, so that `make test` is the same every time: its options are left out here
        command = [sys.executable, "-m", "pytest", "-o", "addopts=-q", f"--randomly-seed={seed}", *options]
        print(f"---- {level}, threads: {threads}, order: {seed}", *(f"{name}={value}" for name, value in settings.items()), flush=True)
        done = subprocess.run(command, cwd=Path(__file__).parent.parent, env=os.environ | settings)
        if done.returncode:
            return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
