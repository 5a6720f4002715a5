"""The command line: thin. torch is imported inside commands, so that --help is instant."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from emosteer import __version__
from emosteer.base import processes, stopping
from emosteer.base.errors import EmosteerError, says_out_of_memory
from emosteer.cli.ablate import ablate
from emosteer.cli.build import build
from emosteer.cli.cache import cache
from emosteer.cli.calibrate import calibrate
from emosteer.cli.chat import chat
from emosteer.cli.checked import CheckedCommand
from emosteer.cli.circuit import circuit
from emosteer.cli.doctor import doctor
from emosteer.cli.effects import effects
from emosteer.cli.evaluate import evaluate
from emosteer.cli.export import export
from emosteer.cli.extract import extract
from emosteer.cli.generate import generate
from emosteer.cli.geometry import geometry
from emosteer.cli.heads import heads
from emosteer.cli.inspect import inspect
from emosteer.cli.judge import judge
from emosteer.cli.models import models
from emosteer.cli.probe import probe
from emosteer.cli.report import report
from emosteer.cli.serve import serve
from emosteer.cli.validate import validate

# typer carries its own copy of click since 0.20 or so and used the real one before: its errors are found through its own names
_ClickException: type[Exception] = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")

#: The exit code of an interrupted command; newer versions of typer return it where older ones raised.
INTERRUPTED = 130
#: Commands that keep what they have finished, and what is said of it when they are stopped.
GOES_ON = ("build", "extract", "ablate", "calibrate", "evaluate", "generate", "judge", "probe", "effects", "validate")
KEPT = "what was finished is kept, the same command goes on from there"
NOT_KEPT = "nothing was left half written, the same command starts again"

#: The panels of `--help`, by what people want to do, in this order; a new command names its own.
USE, DISCOVER, EVALUATE, SHIP, SET_UP = "Use an emotion", "Discover a circuit", "Evaluate it", "Ship it", "Set up and look after"
#: Blank lines keep the lines apart: `--help` flows what stands between them.
EXAMPLES = """Examples:

emosteer generate "My landlord came by this morning." --emotion anger

emosteer generate "Hello!" -e fear -m Qwen/Qwen2.5-1.5B-Instruct --auto

emosteer extract --dry-run: what it would do, and how long that takes here

emosteer doctor: what is missing, and the command that fixes it"""

app = typer.Typer(
    name="emosteer",
    help="Find emotion circuits in language models and write with them.",
    epilog=EXAMPLES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(cls=CheckedCommand, rich_help_panel=USE)(generate)
app.command(cls=CheckedCommand, rich_help_panel=USE)(chat)
app.command(cls=CheckedCommand, rich_help_panel=USE)(serve)
app.command(cls=CheckedCommand, rich_help_panel=DISCOVER)(build)
app.command(cls=CheckedCommand, rich_help_panel=DISCOVER)(extract)
app.command(cls=CheckedCommand, rich_help_panel=DISCOVER)(ablate)
app.command(cls=CheckedCommand, rich_help_panel=DISCOVER)(circuit)
app.command(cls=CheckedCommand, rich_help_panel=DISCOVER)(probe)
app.command(cls=CheckedCommand, rich_help_panel=DISCOVER)(heads)
app.command(cls=CheckedCommand, rich_help_panel=DISCOVER)(geometry)
app.command(cls=CheckedCommand, rich_help_panel=DISCOVER)(inspect)
app.command(cls=CheckedCommand, rich_help_panel=EVALUATE)(calibrate)
app.command(cls=CheckedCommand, rich_help_panel=EVALUATE)(judge)
app.command(cls=CheckedCommand, rich_help_panel=EVALUATE)(evaluate)
app.command(cls=CheckedCommand, rich_help_panel=EVALUATE)(validate)
app.command(cls=CheckedCommand, rich_help_panel=EVALUATE)(effects)
app.command(cls=CheckedCommand, rich_help_panel=EVALUATE)(report)
app.command(cls=CheckedCommand, rich_help_panel=SHIP)(export)
app.add_typer(models, name="models", rich_help_panel=SET_UP)
app.command(cls=CheckedCommand, rich_help_panel=SET_UP)(doctor)
app.add_typer(cache, name="cache", rich_help_panel=SET_UP)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"emosteer {__version__}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Find emotion circuits in language models and write with them."""
    stopping.promise(KEPT if context.invoked_subcommand in GOES_ON else NOT_KEPT)
    processes.refuse(context.invoked_subcommand)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line. Errors are one line on stderr: exit code 2 for usage, 1 for failure, 130 when interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    # accepted anywhere on the line, as people add it after the command that failed
    arguments = [argument for argument in arguments if argument != "--debug"]
    guarded(lambda: app(arguments, standalone_mode=False), debug)


def guarded(run: Callable[[], object], debug: bool = False) -> None:
    """Runs something and turns whatever goes wrong into one line and an exit code; with `debug`, errors are raised."""
    try:
        with stopping.caught():
            status = run()
    except EmosteerError as error:
        _if_stopped()
        if debug:
            raise
        _fail(str(error), error.exit_code)
    except processes.ShareDone:
        sys.exit(0)
    except _ClickException as error:
        context = getattr(error, "ctx", None)
        if type(error).__name__ == "NoArgsIsHelpError" and context is not None:
            typer.echo(context.get_help())
            sys.exit(2)
        if debug:
            raise
        hint = f" (see `{context.command_path} --help`)" if context is not None else ""
        _fail(f"{error.format_message()}{hint}", 2)  # type: ignore[attr-defined]
    except (KeyboardInterrupt, typer.Abort):
        _stopped(signal.SIGINT)
    except stopping.Terminated:
        _stopped(signal.SIGTERM)
    except BrokenPipeError:
        sys.stderr.close()  # nobody reads any more, as with `| head`
        sys.exit(0)
    except Exception as error:
        _if_stopped()
        if debug:
            raise
        _fail(_unforeseen(error), 1)
    else:
        if status == INTERRUPTED:
            _stopped(signal.SIGINT)
        sys.exit(status if isinstance(status, int) else 0)


def _if_stopped() -> None:
    """Where a signal came, what it led to is told as that."""
    if (number := stopping.received()) is not None:
        _stopped(number)


def _stopped(number: int) -> None:
    stopping.told()
    _fail(stopping.line(number), stopping.CODES[signal.Signals(number)])


def _unforeseen(error: Exception) -> str:
    if says_out_of_memory(error):
        return "out of memory; try --dtype bfloat16, smaller batches or fewer prompts (see --help), or a smaller model"
    if isinstance(error, OSError):
        place = f" {error.filename}" if error.filename else ""
        return f"{error.strerror or error}{place}; check the path, its permissions and the space left"
    text = (str(error).strip().splitlines() or [""])[0]
    return f"unexpected {type(error).__name__}: {text}; run it again with --debug for the traceback"


def _fail(message: str, code: int) -> None:
    """One line. Of several processes only the first says what goes for all: a wrong command line, or the end of the run."""
    rank = processes.rank()
    if not rank or code not in (2, stopping.CODES[signal.SIGTERM]):
        typer.echo(f"emosteer: {message}" if not rank else f"emosteer, process {rank}: {message}", err=True)
    sys.exit(code)
