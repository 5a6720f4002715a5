"""Probes: what of an emotion can be read from a model's states, how long it lasts, and what moves it."""
