"""Errors, files, artefacts, processes, progress: what knows no emotion and no model."""
