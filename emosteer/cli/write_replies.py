"""How `emosteer generate` writes and prints its replies."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from emosteer.cli.announce import announced
from emosteer.writing.settings import BATCH_SIZE

if TYPE_CHECKING:
    from emosteer.base.processes import Crew
    from emosteer.writing.jobs import Job, ReplyWriter


def write_replies(
    writer: ReplyWriter, jobs: Sequence[Job], out: Path | None, circuit: Path | None, fresh: bool, dry_run: bool, as_json: bool, crew: Crew
) -> None:
    """Writes jobs, with what that costs said before it where it is more than a usual batch; a dry run ends there.

    Args:
        circuit: its file, where there is one.
    """
    from emosteer.base.files import sha256_file

    sha256 = sha256_file(circuit) if circuit is not None and writer.circuit is not None else ""
    with _announced(writer, jobs, out, sha256, fresh, dry_run, as_json):
        _written(writer, jobs, out, sha256, fresh, as_json, crew)


def _announced(
    writer: ReplyWriter, jobs: Sequence[Job], out: Path | None, sha256: str, fresh: bool, dry_run: bool, as_json: bool
) -> contextlib.AbstractContextManager[None]:
    """The writing with what it costs said before it, where that is asked for or there is more than a usual batch of it."""
    from emosteer.writing.writer import Writer

    if not isinstance(writer, Writer) or not (dry_run or len(jobs) > BATCH_SIZE):
        return contextlib.nullcontext()
    from emosteer.api.costs.replies import of_generate

    return announced(lambda: of_generate(writer, jobs, out, sha256, fresh), dry_run, as_json)


def _written(writer: ReplyWriter, jobs: Sequence[Job], out: Path | None, sha256: str, fresh: bool, as_json: bool, crew: Crew) -> None:
    from emosteer.base.progress import bar
    from emosteer.writing.jobs import row_of
    from emosteer.writing.reply_files import write_file

    if out is not None:
        rows = write_file(writer, jobs, out, sha256, fresh=fresh, crew=crew)
        if not crew.lead:
            return
        if as_json:
            _print_json(rows)
        else:
            finished = sum(row["finish_reason"] == "stop" for row in rows)
            cut = len(rows) - finished
            where = "; steered at all positions, the prompt's included" if writer.marks.get("positions") == "all" else ""
            ends = f"{finished} ended by the model, {cut} cut off at {writer.decoding.max_new_tokens} tokens"
            typer.echo(f"{len(rows)} replies -> {out} ({ends}{where})")
        return
    run = writer.run_key(sha256)
    if len(jobs) == 1 and not as_json:
        for piece in writer.stream(jobs[0]):
            typer.echo(piece, nl=False)
        typer.echo("")
        return
    several = len({job.messages for job in jobs}) > 1
    written: dict[str, dict[str, Any]] = {}
    waiting = list(jobs)
    with bar("generate (replies)", len(jobs)) as advance:
        for job, reply in writer.write(jobs):
            written[job.id] = row_of(job, reply, run, writer.marks)
            advance(1)
            while waiting and waiting[0].id in written:  # in the order of the input, as soon as it is that reply's turn
                first = waiting.pop(0)
                row = written.pop(first.id)
                if as_json:
                    _print_json([row])
                else:
                    typer.echo(f"{first.id if several else first.emotion}: {row['text']}")


def _print_json(rows: Sequence[dict[str, Any]]) -> None:
    for row in rows:
        typer.echo(json.dumps(row, ensure_ascii=False))
