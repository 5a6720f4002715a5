"""The server that any OpenAI client can use, with its page; and replies written by other engines: vLLM, in an environment of its own."""
