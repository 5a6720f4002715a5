"""Blind judges, soundness, jury, and their training."""
