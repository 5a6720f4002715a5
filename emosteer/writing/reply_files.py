"""Files of replies: written as replies come, gone on with after a stop, by one process or several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from emosteer.base.errors import EmosteerError, UsageError
from emosteer.base.files import write_jsonl
from emosteer.base.jsonl import JsonlLog
from emosteer.base.processes import ALONE, Crew, part, parts
from emosteer.base.progress import bar, note
from emosteer.writing.jobs import Job, ReplyWriter, job_key, row_of
from emosteer.writing.resumable import Row, missing, remove_parts, rows_of_parts, write_batches
from emosteer.writing.writer import Writer


def write_file(
    writer: ReplyWriter, jobs: Sequence[Job], out: Path, circuit_sha256: str = "", *, fresh: bool = False, crew: Crew = ALONE
) -> list[Row]:
    """Writes jobs to a JSONL file, in whatever order they finish; goes on where an earlier run stopped.

    Several processes write the batches that one would write, going on from what `out` holds. Until all are there they are kept beside it,
    by each process what it wrote; then they are appended in the order of one process.

    Args:
        crew: the processes that share the batches; the file is the same as one process's.

    Returns:
        All rows of the file that belong to the jobs, in the order of the jobs.

    Raises:
        UsageError: if the file holds replies of other settings. EmosteerError: if it cannot be written.
    """
    run, share = writer.run_key(circuit_sha256), shares_of(out)
    if fresh and crew.lead:
        out.unlink(missing_ok=True)
        remove_parts(share)
    crew.meet()
    shared = not crew.alone or bool(parts(share))
    if shared and not isinstance(writer, Writer):
        raise UsageError(f"{out} was begun by several processes; finish it with the built-in engine, or --fresh to replace it")
    if crew.lead:
        log = ReplyLog(out, run)  # ends a torn line, which two at a time must not
    crew.meet()
    if not crew.lead:
        log = ReplyLog(out, run)
    todo = [job for job in jobs if job.key not in log.rows]
    _write(writer, todo, len(jobs), log, ReplyLog(part(share, crew.rank), run) if shared else log, share if shared else None, crew)
    if shared:
        crew.meet()
        log = ReplyLog(out, run)
    return [log.rows[job.key] for job in jobs]


def shares_of(out: Path) -> Path:
    """Where several processes keep their replies until all are there (process 0's file, see `processes.part`)."""
    return out.with_name(out.name + ".partial")


def refuse_others(path: Path, rows: Sequence[Row], run: str) -> None:
    """Raises UsageError if a file's rows are not all of one run."""
    if any(row.get("run") != run for row in rows):
        raise UsageError(
            f"{path} holds replies of another run (other model, circuit, decoding or method); name another --out, or --fresh to replace it"
        )


class ReplyLog:
    """A file of replies of one run. rows: by `job_key`, those added since included."""

    def __init__(self, path: Path, run: str) -> None:
        """Opens or creates the file.

        Raises:
            UsageError: if it holds replies of other settings. Otherwise as `JsonlLog`.
        """
        self.path, self.run, self._log = path, run, JsonlLog(path)
        refuse_others(path, self._log.rows, run)
        self.rows: dict[str, Row] = {job_key(row): row for row in self._log.rows}

    def add(self, rows: Mapping[str, Row]) -> None:
        """Appends rows, except those whose key is there already."""
        new = {key: row for key, row in rows.items() if key not in self.rows}
        if new:
            self._log.append(*new.values())
            self.rows |= new


def _write(writer: ReplyWriter, todo: Sequence[Job], n_jobs: int, log: ReplyLog, kept: ReplyLog, share: Path | None, crew: Crew) -> None:
    """Writes the jobs that `log` lacks. n_jobs: with those it has; kept: where this process keeps what it writes, beside `share`'s other
    parts; share: None where that is `log` itself."""
    keys, work = [job.key for job in todo], writer.work(todo)
    crew.meet()  # all have ended the torn lines of their files
    known = _in_parts(share, kept.run) if share else {}
    if share:
        crew.kept = lambda: f"{len(log.rows) + len(_in_parts(share, kept.run))} of {n_jobs} replies are kept in {log.path} and {share}*"
    crew.meet()  # nobody writes before all have read
    if len(todo) < n_jobs or known:
        note(f"going on: {n_jobs - len(todo) + len(known)} of {n_jobs} replies are there")
    wanted = missing(work.order, keys, known)
    with bar("generate (replies)", n_jobs, n_jobs - sum(map(len, wanted))) as advance:
        write_batches(
            wanted,
            keys,
            lambda batch: ([(i, row_of(todo[i], reply, kept.run, writer.marks)) for i, reply in done] for done in work.write(batch)),
            kept,
            crew,
            lambda rows: advance(rows * crew.world),
        )
    if share and crew.lead:
        _join(log, keys, [i for batch in work.order for i in batch], share)


def _in_parts(share: Path, run: str) -> dict[str, Row]:
    return {key: row for key, row in rows_of_parts(share, job_key).items() if row.get("run") == run}


def _join(log: ReplyLog, keys: Sequence[str], order: Sequence[int], share: Path) -> None:
    """Appends what all processes wrote to the file, in the order of one process, and removes their parts."""
    known = _in_parts(share, log.run)
    lost = [key for key in keys if key not in known]
    if lost:
        raise EmosteerError(f"{len(lost)} replies are in no file {share}*: do all processes see the same disk? Run it again")
    write_jsonl(log.path, [*log.rows.values(), *(known[keys[i]] for i in order)])
    remove_parts(share)
