"""Scenario-events, reply banks, lints, splits, emotion words, prompts, authoring."""
