"""Finding and converting weights."""
