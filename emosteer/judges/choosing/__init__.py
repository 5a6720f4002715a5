"""Choosing among several replies to one prompt: a small model reads them, and linear heads on its states say which one is good."""
