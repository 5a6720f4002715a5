"""How tokens are chosen: settings alone, no torch, so that the command line can show them."""

from __future__ import annotations

from dataclasses import dataclass

from emosteer.base.errors import UsageError


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen; the same for every method compared.

    temperature: 0 is greedy; top_p: nucleus, 1 is all; repetition_penalty: 1 is none (small models loop without one), applied to
    the tokens of prompt and reply as Hugging Face does.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.1
    seed: int = 0

    def __post_init__(self) -> None:
        checks = (
            (self.max_new_tokens >= 1, f"--max-new-tokens must be at least 1, found {self.max_new_tokens}"),
            (0 <= self.temperature < float("inf"), f"--temperature must be a number of at least 0, found {self.temperature}"),
            (0 < self.top_p <= 1, f"--top-p must lie between 0 and 1, found {self.top_p}"),
            (0 < self.repetition_penalty < float("inf"), f"--repetition-penalty must be above 0, found {self.repetition_penalty}"),
        )
        for fine, message in checks:
            if not fine:
                raise UsageError(message)
