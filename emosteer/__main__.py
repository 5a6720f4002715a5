"""``python -m emosteer``: the same entry point as the console script."""

from emosteer.cli.start import main

if __name__ == "__main__":
    main()
