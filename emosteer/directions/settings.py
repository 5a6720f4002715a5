"""What shapes an extraction. No torch, so that the command line can show the defaults."""

from __future__ import annotations

from dataclasses import dataclass

from emosteer.scenarios.emotions import emotion_names
from emosteer.scenarios.prompts import INSTRUCTION

#: Tokens per forward pass on a GPU, where nobody says how many.
GPU_TOKENS = 16384


@dataclass(frozen=True)
class Settings:
    """What shapes the result of an extraction. emotions: any names; they are kept in their one spelling (`emotions.emotion_key`)."""

    emotions: tuple[str, ...]
    elicitation: str = "reply"
    instruction: str = INSTRUCTION
    holdout: float = 0.1
    seed: int = 0
    batch_tokens: int = 1024
    packed: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "emotions", emotion_names(self.emotions))
