"""A judge and the check of soundness for whoever shows replies one by one, loaded when they are first asked. No torch at import."""

from __future__ import annotations

from collections.abc import Sequence

from emosteer.judges.protocol import EmotionJudge, SoundnessJudge
from emosteer.judges.registry import EMBEDDED


class Reader:
    """Reads texts."""

    def __init__(self, judge: str = EMBEDDED) -> None:
        """judge: a specification, as `emosteer judge --judge` takes it."""
        self.spec = judge
        self._loaded: tuple[EmotionJudge, SoundnessJudge] | None = None

    def judges(self) -> tuple[EmotionJudge, SoundnessJudge]:
        """Both."""
        if self._loaded is None:
            from emosteer.judges.registry import judge_of, make_judges
            from emosteer.judges.soundness import SoundnessCheck

            panel = make_judges(self.spec)
            encoder = next((one.encoder for one in panel if hasattr(one, "encoder")), None)
            self._loaded = judge_of(panel), SoundnessCheck.load(encoder=encoder)
        return self._loaded

    def shares(self, texts: Sequence[str]) -> list[dict[str, float]]:
        """How much of every emotion each text expresses; nothing where the judge failed."""
        return [dict(opinion.probabilities or {}) for opinion in self.judges()[0].opinions(list(texts))]
