"""A circuit at one strength, written for other engines: a plain checkpoint, a llama.cpp control vector, a GGUF model."""
