"""Who reads the contest's replies: a blind judge of the emotion, a check for sound text, an encoder for the content.

Opinions are kept on disk. What a local judge says of a text depends, in its last bits, on the texts that it reads with it: texts are
therefore read in fixed chunks, whole or again. An endpoint's opinions are kept one by one, and only missing ones are asked again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from emosteer.base.files import sha256_text
from emosteer.base.jsonl import KeyedLog
from emosteer.base.progress import bar, note
from emosteer.judges.protocol import LABELS, NEUTRAL, EmotionJudge, Encoder, Opinion, Soundness, SoundnessJudge

#: Texts that are read at a time.
CHUNK = 256


@dataclass(frozen=True, eq=False)
class Jury:
    """Everybody who reads. kept: what was said; paid: the judge's opinions cost money or time each and do not depend on their neighbours
    (an endpoint): each is kept at once and only missing ones are asked."""

    judge: EmotionJudge
    soundness: SoundnessJudge
    encoder: Encoder
    kept: KeyedLog
    paid: bool = False

    def opinions(self, texts: Sequence[str], what: str) -> dict[str, Opinion]:
        """Text -> opinion; identical texts are judged once. A missing opinion is not kept, so that the next run asks again.

        An empty text is not shown to a judge, who would have to guess: it is neutral, and matches no emotion.

        Args:
            what: for the progress bar.
        """
        opinions: dict[str, Opinion] = {"": Opinion({label: float(label == NEUTRAL) for label in LABELS})}
        unique = [text for text in dict.fromkeys(texts) if text]
        with bar(f"{what} (opinions)", len(unique)) as advance:
            for start in range(0, len(unique), CHUNK):
                chunk = unique[start : start + CHUNK]
                missing = [text for text in chunk if self._key(self.judge.key, text) not in self.kept.rows]
                failed = self._ask(missing if self.paid else chunk) if missing else {}
                for text in chunk:
                    row = self.kept.rows.get(self._key(self.judge.key, text))
                    opinions[text] = Opinion(row["probabilities"]) if row else failed[text]
                advance(len(chunk))
        lost = [opinion.problem for opinion in opinions.values() if opinion.probabilities is None]
        if lost:
            note(f"{what}: {len(lost)} of {len(unique)} opinions are missing ({lost[0] or 'no reason given'}); the same command asks again")
        return opinions

    def verdicts(self, texts: Sequence[str], what: str) -> dict[str, Soundness]:
        """Text -> whether it is sound."""
        unique, name = list(dict.fromkeys(texts)), self.soundness.key
        with bar(f"{what} (soundness)", len(unique)) as advance:
            for start in range(0, len(unique), CHUNK):
                chunk = unique[start : start + CHUNK]
                if any(self._key(name, text) not in self.kept.rows for text in chunk):
                    checked = dict(zip(chunk, self.soundness.check(chunk), strict=True))
                    self.kept.add({self._key(name, t): {"soundness": name, **vars(verdict)} for t, verdict in checked.items()})
                advance(len(chunk))
        rows = {text: self.kept.rows[self._key(name, text)] for text in unique}
        return {text: Soundness(row["sound"], tuple(row["reasons"]), row["score"]) for text, row in rows.items()}

    def _ask(self, texts: Sequence[str]) -> dict[str, Opinion]:
        """Asks, keeps the opinions, and returns those that failed."""

        def keep(answers: Mapping[str, Opinion]) -> None:
            known = {text: opinion.probabilities for text, opinion in answers.items() if opinion.probabilities is not None}
            self.kept.add({self._key(self.judge.key, t): {"judge": self.judge.key, "probabilities": rounded(p)} for t, p in known.items()})

        opinions = self.judge.opinions(texts, (lambda index, opinion: keep({texts[index]: opinion})) if self.paid else None)
        answers = dict(zip(texts, opinions, strict=True))
        keep(answers)
        return {text: opinion for text, opinion in answers.items() if opinion.probabilities is None}

    @staticmethod
    def _key(who: str, text: str) -> str:
        return sha256_text(json.dumps([who, text]))


def make_jury(spec: str, **options: Any) -> Callable[[KeyedLog], Jury]:
    """The judges that a specification names (see `judges.make_judge`, which takes the options), made at once, so that what is wrong with
    them is said before a model is loaded. Returns where they keep what they say -> jury."""
    from emosteer.judges.embedded import SentenceEncoder
    from emosteer.judges.registry import JudgeSpec, make_judge
    from emosteer.judges.soundness import SoundnessCheck

    judge = make_judge(spec, **options)
    encoder = getattr(judge, "encoder", None) or SentenceEncoder()  # the embedded judge's encoder serves all
    soundness = SoundnessCheck.load(encoder=encoder)
    return lambda kept: Jury(judge, soundness, encoder, kept, paid=JudgeSpec.parse(spec).remote)


def rounded(shares: Mapping[str, float]) -> dict[str, float]:
    """Probabilities as they are kept: six digits after the point."""
    return {label: round(float(share), 6) for label, share in shares.items()}
