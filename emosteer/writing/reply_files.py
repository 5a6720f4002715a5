"""Files of replies: written as replies come, gone on with after a stop, by one process or several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from emosteer.base.errors import EmosteerError, UsageError
from emosteer.base.files import write_jsonl
from emosteer.base.jsonl import JsonlLog, whole_rows
from emosteer.base.processes import ALONE, Crew, part, parts
from emosteer.base.progress import bar, note
from emosteer.generation.generate import batches
from emosteer.writing.jobs import Job, ReplyWriter, job_key, row_of
from emosteer.writing.writer import Writer


def write_file(
    writer: ReplyWriter, jobs: Sequence[Job], out: Path, circuit_sha256: str = "", *, fresh: bool = False, crew: Crew = ALONE
) -> list[dict[str, Any]]:
    """Writes jobs to a JSONL file, in whatever order they finish; goes on where an earlier run stopped.

    Args:
        crew: the processes that share the batches; the file is the same as one process's.

    Returns:
        All rows of the file that belong to the jobs, in the order of the jobs.

    Raises:
        UsageError: if the file holds replies of other settings. EmosteerError: if it cannot be written.
    """
    run, share = writer.run_key(circuit_sha256), shares_of(out)
    if fresh and crew.lead:
        for path in (out, *parts(share).values()):
            path.unlink(missing_ok=True)
    crew.meet()
    if not crew.alone or parts(share):
        if not isinstance(writer, Writer):
            raise UsageError(f"{out} was begun by several processes; finish it with the built-in engine, or --fresh to replace it")
        return _write_shared(writer, jobs, out, run, crew)
    log, keys = _opened(out, run)
    todo = [job for job in jobs if job.key not in keys]
    if len(todo) < len(jobs):
        note(f"going on: {len(jobs) - len(todo)} of {len(jobs)} replies are there")
    with bar("generate (replies)", len(jobs), len(jobs) - len(todo)) as advance:
        for job, reply in writer.write(todo):
            row = row_of(job, reply, run, writer.marks)
            log.append(row)
            keys[job_key(row)] = row
            advance(1)
    return [keys[job.key] for job in jobs]


def shares_of(out: Path) -> Path:
    """Where several processes keep their replies until all are there (process 0's file, see `workers.part`)."""
    return out.with_name(out.name + ".partial")


def _opened(path: Path, run: str) -> tuple[JsonlLog, dict[str, dict[str, Any]]]:
    """A file of replies, and its rows by key.

    Raises:
        UsageError: if it holds replies of other settings.
    """
    log = JsonlLog(path)
    if any(row.get("run") != run for row in log.rows):
        raise UsageError(
            f"{path} holds replies of another run (other model, circuit, decoding or method); name another --out, or --fresh to replace it"
        )
    return log, {job_key(row): row for row in log.rows}


def _write_shared(writer: Writer, jobs: Sequence[Job], out: Path, run: str, crew: Crew) -> list[dict[str, Any]]:
    """As one process would go on from what `out` holds: the same batches, appended in the same order. Until all are there they are kept
    beside it, by each process what it wrote; a batch that a killed process left in part is written again, whole."""
    if crew.lead:
        _opened(out, run)  # ends a torn line, which two at a time must not
    crew.meet()
    keys = _opened(out, run)[1]
    todo = [job for job in jobs if job.key not in keys]
    names, requests = [job.key for job in todo], writer.requests(todo)
    order = list(batches(requests, writer.batch_size))
    log, mine = _opened(part(shares_of(out), crew.rank), run)
    crew.meet()  # all have ended the torn lines of their files

    def there() -> dict[str, dict[str, Any]]:
        rows = (row for path in parts(shares_of(out)).values() for row in whole_rows(path))
        return {job_key(row): row for row in rows if row.get("run") == run}

    known = there()
    crew.kept = lambda: f"{len(keys) + len(there())} of {len(jobs)} replies are kept in {out} and {shares_of(out)}*"
    crew.meet()  # nobody writes before all have read
    if len(todo) < len(jobs) or known:
        note(f"going on: {len(jobs) - len(todo) + len(known)} of {len(jobs)} replies are there")
    missing = [index for index in order if any(names[i] not in known for i in index)]
    with bar("generate (replies)", len(jobs), len(jobs) - sum(map(len, missing))) as advance:
        for done in writer.write_batches(todo, requests, crew.claim(missing)):
            log.append(*(row_of(todo[i], reply, run) for i, reply in done if names[i] not in mine))
            advance(len(done) * crew.world)
    crew.meet()
    if crew.lead:
        known = there()
        lost = [name for name in names if name not in known]
        if lost:
            raise EmosteerError(f"{len(lost)} replies are in no file {shares_of(out)}*: do all processes see the same disk? Run it again")
        rows = [*keys.values(), *(known[names[i]] for index in order for i in index)]
        write_jsonl(out, rows)
        for path in parts(shares_of(out)).values():
            path.unlink(missing_ok=True)
    crew.meet()
    keys = _opened(out, run)[1]
    return [keys[job.key] for job in jobs]
