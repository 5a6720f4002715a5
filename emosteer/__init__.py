"""emosteer: find emotion circuits in language models and write with them."""

__version__ = "0.1.0"
