"""Commands, options, printing."""
