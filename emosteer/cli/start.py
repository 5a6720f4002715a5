"""The entry point of the command: takes the signals over before anything else is imported, since most of a short command is imports."""

from emosteer.base import stopping


def main() -> None:
    """Runs the command line; from here on Ctrl-C and SIGTERM end in one line."""
    stopping.install()
    try:
        from emosteer.cli.main import main as run

        run()
    finally:
        stopping.finished()
