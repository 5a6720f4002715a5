"""The entry point of the command: takes the signals over before anything else is imported, since most of a short command is imports."""

# The C part of `signal`, which needs no import from the disk: until the handlers are there, Ctrl-C ends the process without a traceback.
import _signal  # type: ignore[import-not-found]

if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:  # where it is ignored, it stays so
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)

from emosteer.base import stopping  # noqa: E402


def main() -> None:
    """Runs the command line; from here on Ctrl-C and SIGTERM end in one line."""
    stopping.install()
    try:
        from emosteer.cli.main import main as run

        run()
    finally:
        stopping.finished()
