"""How tokens are chosen: settings alone, no torch, so that the command line can show them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from emosteer.base.errors import UsageError

#: Guidance by the prompt of replies that are to be read, unless told otherwise.
GUIDANCE = 1.5
#: How the candidates are drawn that the best is chosen from, where a reply alone would be greedy: all greedy ones are alike.
DRAWN_TEMPERATURE, DRAWN_TOP_P = 0.7, 0.95
#: Most candidates that a reply may be chosen from.
MAX_CANDIDATES = 64
#: The longest reply that can be asked for, in tokens.
MAX_TOKENS = 100_000


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen; the same for every method compared.

    temperature: 0 is greedy; top_p: nucleus, 1 is all; repetition_penalty: 1 is none (small models loop without one), of the
    tokens that the reply has so far and, where `penalise_prompt`, of the prompt's, as Hugging Face has it. guidance: by the prompt
    (`generation.guidance`), 1 is none; it takes two rows a reply. best_of: candidates that each reply is chosen from (`writing.best_of`), 1
    is none. `usual` has what replies that are to be read are written with.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.1
    seed: int = 0
    guidance: float = 1.0
    penalise_prompt: bool = True
    best_of: int = 1

    def __post_init__(self) -> None:
        checks = (
            (self.max_new_tokens >= 1, f"--max-new-tokens must be at least 1, found {self.max_new_tokens}"),
            (self.max_new_tokens <= MAX_TOKENS, f"--max-new-tokens must be at most {MAX_TOKENS}, found {self.max_new_tokens}"),
            (0 <= self.temperature < float("inf"), f"--temperature must be a number of at least 0, found {self.temperature}"),
            (0 < self.top_p <= 1, f"--top-p must lie between 0 and 1, found {self.top_p}"),
            (1 <= self.guidance < float("inf"), f"--guidance must be a number of at least 1, found {self.guidance}"),
            (0 < self.repetition_penalty < float("inf"), f"--repetition-penalty must be above 0, found {self.repetition_penalty}"),
            (1 <= self.best_of <= MAX_CANDIDATES, f"--best-of must lie between 1 and {MAX_CANDIDATES}, found {self.best_of}"),
        )
        for fine, message in checks:
            if not fine:
                raise UsageError(message)

    @classmethod
    def usual(cls, **given: Any) -> Decoding:
        """How replies are written that are to be read: guided by the prompt, whose words may be taken up at no cost. A reply answers in the
        words of what was said, and a penalty on those keeps a small model from answering (docs/CIRCUITS.md, "Examples, and the words of
        the prompt").

        Args:
            given: fields that are to be otherwise.
        """
        return cls(**{"guidance": GUIDANCE, "penalise_prompt": False, **given})

    @property
    def shaping(self) -> dict[str, float]:
        """What shapes a reply, for keys of what is on disk: those from before there was guidance, or a choice of penalties, stay."""
        later = {
            "guidance": not self.guides,
            "penalise_prompt": self.penalise_prompt or self.repetition_penalty == 1,
            "best_of": not self.chooses,
        }
        return {name: value for name, value in vars(self).items() if not later.get(name, False)}

    @property
    def guides(self) -> bool:
        """Whether the prompt guides the reply, so that requests need their empty prompt."""
        return self.guidance != 1

    @property
    def chooses(self) -> bool:
        """Whether each reply is chosen among several."""
        return self.best_of != 1

    @property
    def drawing(self) -> Decoding:
        """How one of the candidates is written."""
        if self.chooses and self.temperature == 0:
            return replace(self, best_of=1, temperature=DRAWN_TEMPERATURE, top_p=min(self.top_p, DRAWN_TOP_P))
        return replace(self, best_of=1)
