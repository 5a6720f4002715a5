"""Steering plans, engines, KV cache, the fast forward pass, decoding, fluency."""
