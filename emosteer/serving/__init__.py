"""Replies written by other engines."""
