"""Judges by name: "embedded", "hf:ID", "openai:MODEL". Each brings its own libraries, so that they are imported only when asked for."""

from __future__ import annotations

import os
from pathlib import Path

from emosteer.base.cache_folder import cache_dir
from emosteer.base.errors import UsageError, suggest
from emosteer.base.files import slug
from emosteer.judges.protocol import EmotionJudge

JUDGE_FORMS = "embedded, hf:ID_OR_FOLDER or openai:MODEL"
KEY_ENV = "OPENAI_API_KEY"


def make_judge(
    spec: str,
    *,
    base_url: str | None = None,
    key_env: str = KEY_ENV,
    cache: Path | None = None,
    parallel: int = 8,
    device: str = "auto",
) -> EmotionJudge:
    """Makes the judge that a specification names.

    Args:
        base_url, key_env, parallel: of an OpenAI-compatible endpoint.
        cache: file for its answers; None is a file per model in the cache folder, so that nothing is paid for twice.
        device: of a Hugging Face classifier.

    Raises:
        UsageError: if the specification or an option makes no sense. EmosteerError: if the judge cannot be had.
    """
    kind, colon, name = spec.strip().partition(":")
    kind = kind.lower()
    if kind != "openai" and (base_url is not None or cache is not None):
        raise UsageError(f"--base-url and --cache have a meaning with --judge openai:MODEL only, found --judge {spec}")
    if kind == "embedded" and not colon:
        from emosteer.judges.embedded import EmbeddedJudge

        return EmbeddedJudge.load()
    if kind == "hf" and name:
        from emosteer.judges.huggingface import HfJudge

        return HfJudge.load(name, device)
    if kind == "openai" and name:
        return _openai(name, base_url, key_env, cache, parallel)
    hint = f" (did you mean 'hf:{spec}'?)" if "/" in spec and not colon else suggest(kind, ("embedded", "hf", "openai"))
    raise UsageError(f"unknown judge '{spec}'{hint}; expected {JUDGE_FORMS}")


def _openai(model: str, base_url: str | None, key_env: str, cache: Path | None, parallel: int) -> EmotionJudge:
    from emosteer.judges.openai import OpenAIJudge

    if base_url is None:
        raise UsageError(f"--judge openai:{model} needs --base-url: the address of the server, e.g. http://127.0.0.1:8000/v1")
    if key_env != KEY_ENV and not os.environ.get(key_env):
        raise UsageError(f"the environment variable {key_env} that --key-env names is not set")
    file = cache if cache is not None else cache_dir() / "judges" / f"{slug(model).replace(':', '-')}.jsonl"
    return OpenAIJudge(base_url, model, key_env=key_env, cache=file, parallel=parallel)
