"""Several processes of one command, as started by `torchrun`: who does what, who waits for whom, and what is reported when one dies.

Work is cut into numbered pieces that mean the same whoever does them. A process claims the next piece from a common counter and keeps
what it found in a file of its own (`part`), written as a single process writes its progress; process 0 merges the files in the order of
the pieces. Only counters and short words go through torch's store, so a killed process loses nothing that was on disk, and the next
run, of however many processes, goes on. The files must be on a disk that all processes see. No torch at import.
"""

from __future__ import annotations

import glob
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from emosteer.base import stopping
from emosteer.base.errors import EmosteerError, UsageError

#: Commands that can be run by several processes.
COMMANDS = ("extract", "ablate", "generate", "evaluate")
#: Seconds between signs of life; seconds of silence after which a process counts as dead, and after which it never started.
BEAT, PATIENCE, START = 5.0, 120.0, 1800.0

Item = TypeVar("Item")


class ShareDone(Exception):
    """This process has done its share; the rest is process 0's."""


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    if not text:
        return default
    return int(text) if text.isdigit() else default


def world() -> int:
    """How many processes run this command; 1 without `torchrun`."""
    return max(_number("WORLD_SIZE", 1), 1) if "RANK" in os.environ else 1


def rank() -> int:
    """Which of them this is; 0 without `torchrun`."""
    return _number("RANK", 0) if world() > 1 else 0


def local_rank() -> int | None:
    """Which of those on this machine this is; None without `torchrun`."""
    return _number("LOCAL_RANK", 0) if world() > 1 else None


def local_world() -> int:
    """How many processes run on this machine; 1 without `torchrun`."""
    return max(_number("LOCAL_WORLD_SIZE", 1), 1) if world() > 1 else 1


def refuse(command: str | None) -> None:
    """Refuses commands that are one process's work.

    Raises:
        UsageError: naming those that can be run by several processes.
    """
    if world() > 1 and command not in COMMANDS:
        raise UsageError(
            f"`{command}` runs as one process, found {world()}; start it without torchrun ({', '.join(COMMANDS)} can be split)"
        )


def part(path: Path, number: int) -> Path:
    """The file of one process's share: `path` itself for process 0, `path.rankN` for the others."""
    return path.with_name(f"{path.name}.rank{number}") if number else path


def parts(path: Path) -> dict[int, Path]:
    """The shares that are on disk: process -> file, `path` itself included."""
    by_rank = {0: path} if path.is_file() else {}
    for other in path.parent.glob(f"{glob.escape(path.name)}.rank*"):
        if match := re.fullmatch(re.escape(path.name) + r"\.rank(\d+)", other.name):
            by_rank[int(match[1])] = other
    return dict(sorted(by_rank.items()))


class Crew:
    """The processes of a run, seen from one of them. rank: this one; world: how many.

    All processes must call `claim`, `meet`, `tell` and `hear` in the same order.
    """

    def __init__(self, rank: int = 0, world: int = 1, store: Any = None) -> None:
        """store: torch's key-value store; none for a single process."""
        self.rank, self.world, self._store, self._calls = rank, world, store, 0
        #: What a stopped run says of the work that is kept.
        self.kept: Callable[[], str] = lambda: "what was finished is kept"
        self._seen: dict[int, tuple[bytes, float]] = {}

    @property
    def alone(self) -> bool:
        """Whether there is one process only."""
        return self.world == 1

    @property
    def lead(self) -> bool:
        """Whether this is process 0, which merges, saves and prints."""
        return self.rank == 0

    # ---- sharing ---------------------------------------------------------------------------------------------------

    def claim(self, items: Sequence[Item]) -> Iterator[Item]:
        """Yields the items that fall to this process: the next one that nobody has taken, whenever it asks. Alone it yields all."""
        if self.alone:
            yield from items
            return
        name = self._name("claim")
        while (index := self._ask(lambda: self._store.add(name, 1)) - 1) < len(items):
            yield items[index]

    def meet(self) -> None:
        """Waits until every process is here.

        Raises:
            EmosteerError: if one of them died.
        """
        if not self.alone:
            name = self._name("meet")
            self._put(f"{name}/{self.rank}", "here")
            self._wait({r: f"{name}/{r}" for r in range(self.world)})

    def tell(self, word: str) -> None:
        """Process 0 says a word, which the others `hear`."""
        if not self.alone:
            self._put(self._name("word"), word)

    def hear(self) -> str:
        """Waits for what process 0 tells."""
        name = self._name("word")
        self._wait({0: name})
        return str(self._ask(lambda: self._store.get(name)).decode())

    def finish(self) -> None:
        """The end of the shared work. Process 0 waits for all others; they end here.

        Raises:
            ShareDone: in every process but 0. EmosteerError: if one of them died.
        """
        if self.alone:
            return
        name = self._name("finish")
        if not self.lead:
            self._put(f"{name}/{self.rank}", "done")
            raise ShareDone
        self._wait({r: f"{name}/{r}" for r in range(1, self.world)})

    # ---- the store -------------------------------------------------------------------------------------------------

    def _name(self, what: str) -> str:
        self._calls += 1
        return f"emosteer/{what}/{self._calls}"

    def _put(self, name: str, word: str) -> None:
        self._ask(lambda: self._store.set(name, word))

    def _there(self, name: str) -> bool:
        return bool(self._ask(lambda: self._store.check([name])))

    def _ask(self, question: Callable[[], Any]) -> Any:
        try:
            return question()
        except RuntimeError as error:  # torch's DistError and its like: whoever keeps the store is gone
            raise self._lost("the other processes cannot be reached any more") from error

    def _lost(self, what: str) -> EmosteerError:
        return EmosteerError(f"{what}; {self.kept()}; the same command goes on, with as many processes as you like")

    def _wait(self, names: dict[int, str]) -> None:
        """Waits until all names (process -> name) are in the store, as long as the processes that owe them are alive."""
        start, pause = time.monotonic(), 0.005
        while missing := [r for r, name in names.items() if not self._there(name)]:
            for other in missing:
                self._require_alive(other, start)
            time.sleep(pause)
            pause = min(pause * 1.5, 0.5)

    def _require_alive(self, other: int, since: float) -> None:
        name, now = f"emosteer/beat/{other}", time.monotonic()
        if not self._there(name):
            if now - since > START:
                raise self._lost(f"process {other} of {self.world} has not started within {START / 60:.0f} minutes")
            return
        beat = self._ask(lambda: self._store.get(name))
        before, changed = self._seen.get(other, (b"", now))
        if beat != before:
            self._seen[other] = beat, now
        elif now - changed > PATIENCE:
            raise self._lost(f"process {other} of {self.world} died: no sign of life for {now - changed:.0f} seconds")

    # ---- life and death --------------------------------------------------------------------------------------------

    def live(self) -> None:
        """Gives signs of life from now on, and ends with a message when told to (torchrun does so when another process died)."""

        def beat() -> None:
            count = 0
            while True:
                try:
                    self._store.set(f"emosteer/beat/{self.rank}", str(count))
                except RuntimeError:  # the store is gone: whoever waits finds out by itself
                    return
                count += 1
                time.sleep(BEAT)

        threading.Thread(target=beat, daemon=True, name="signs of life").start()
        stopping.install(signal.SIGTERM)
        stopping.on_term(self._why_stopped)
        stopping.quiet(not self.lead)

    def _why_stopped(self) -> str:
        return (
            "stopped by torchrun, most likely because another process of this run died; "
            f"{self.kept()}; the same command goes on, with as many processes as you like"
        )


#: The single process that most commands are.
ALONE = Crew()


@cache
def join() -> Crew:
    """Joins the processes that `torchrun` started, once; alone where it did not.

    Raises:
        UsageError: if its variables are missing. EmosteerError: if the others cannot be reached.
    """
    if world() == 1:
        return ALONE
    if rank() >= world():
        raise UsageError(f"expected RANK below WORLD_SIZE ({world()}), found {rank()}; start it with torchrun")
    import torch.distributed

    if not torch.distributed.is_available():
        raise EmosteerError("this build of torch has no torch.distributed; run one process, or install another build")
    from torch.distributed.rendezvous import rendezvous

    try:
        store = next(rendezvous("env://"))[0]
    except ValueError as error:
        raise UsageError(f"RANK and WORLD_SIZE are set, but {error}; start it with torchrun") from error
    except RuntimeError as error:
        text = str(error).strip().splitlines()[0]
        raise EmosteerError(
            f"the other processes cannot be reached ({text}); check MASTER_ADDR and MASTER_PORT, or use torchrun"
        ) from error
    crew = Crew(rank(), world(), store)
    crew.live()
    return crew
