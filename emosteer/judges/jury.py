"""Who reads the contest's replies: a panel of blind judges of the emotion, a check for sound text, a check that a reply answers its prompt,
an encoder for the content.

What was said is kept on disk, by judge. What a local judge says of a text depends, in its last bits, on the texts that it reads with it:
texts are therefore read in fixed chunks, whole or again. An endpoint's opinions are kept one by one, and only missing ones are asked again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from emosteer.base.files import sha256_text
from emosteer.base.jsonl import KeyedLog
from emosteer.base.progress import bar, note
from emosteer.judges.panel import Panel, Reading
from emosteer.judges.protocol import LABELS, AnswerJudge, EmotionJudge, Encoder, Opinion, Soundness, SoundnessJudge
from emosteer.scenarios.scenarios import NEUTRAL

#: Texts that are read at a time.
CHUNK = 256


@dataclass(frozen=True, eq=False)
class Jury:
    """Everybody who reads. judges: of the emotion, the panel; kept: what was said; paid: keys of the judges whose opinions cost money or
    time each and do not depend on their neighbours (an endpoint): each is kept at once and only missing ones are asked."""

    judges: tuple[EmotionJudge, ...]
    soundness: SoundnessJudge
    answers: AnswerJudge
    encoder: Encoder
    kept: KeyedLog
    paid: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """The judges' names, for people."""
        return Panel(self.judges).name

    @property
    def key(self) -> str:
        """The panel's key."""
        return Panel(self.judges).key

    def readings(self, texts: Sequence[str], what: str) -> dict[str, Reading]:
        """Text -> what the panel says of it; identical texts are judged once. A missing opinion is not kept, so that the next run asks
        again.

        An empty text is not shown to a judge, who would have to guess: it is neutral, and matches no emotion.

        Args:
            what: for the progress bar.
        """
        unique = [text for text in dict.fromkeys(texts) if text]
        by_judge = {judge.name: self._opinions(judge, unique, what) for judge in self.judges}
        empty = Opinion({label: float(label == NEUTRAL) for label in LABELS})
        readings = {"": Reading(dict.fromkeys(by_judge, empty))}
        return readings | {text: Reading({name: opinions[text] for name, opinions in by_judge.items()}) for text in unique}

    def _opinions(self, judge: EmotionJudge, unique: Sequence[str], what: str) -> dict[str, Opinion]:
        opinions: dict[str, Opinion] = {}
        with bar(f"{what} ({judge.name})", len(unique)) as advance:
            for start in range(0, len(unique), CHUNK):
                chunk = unique[start : start + CHUNK]
                missing = [text for text in chunk if self._key(judge.key, text) not in self.kept.rows]
                failed = self._ask(judge, missing if judge.key in self.paid else chunk) if missing else {}
                for text in chunk:
                    row = self.kept.rows.get(self._key(judge.key, text))
                    opinions[text] = Opinion(row["probabilities"]) if row else failed[text]
                advance(len(chunk))
        lost = [opinion.problem for opinion in opinions.values() if opinion.probabilities is None]
        if lost:
            reason = lost[0] or "no reason given"
            note(f"{what}: {len(lost)} of {len(unique)} opinions of {judge.name} are missing ({reason}); the same command asks again")
        return opinions

    def verdicts(self, texts: Sequence[str], what: str) -> dict[str, Soundness]:
        """Text -> whether it is sound."""
        name = self.soundness.key
        rows = self._checked(name, texts, f"{what} (soundness)", lambda chunk: [vars(verdict) for verdict in self.soundness.check(chunk)])
        return {text: Soundness(row["sound"], tuple(row["reasons"]), row["score"]) for text, row in rows.items()}

    def answering(self, pairs: Sequence[tuple[str, str]], what: str) -> dict[tuple[str, str], float]:
        """(prompt, reply) -> probability that the reply answers the prompt; an empty reply answers nothing."""
        known = {pair_text(*pair): pair for pair in dict.fromkeys(pairs) if pair[1].strip()}

        def read(chunk: Sequence[str]) -> list[dict[str, Any]]:
            return [{"answers": round(share, 6)} for share in self.answers.probabilities([known[text] for text in chunk])]

        rows = self._checked(self.answers.key, list(known), f"{what} (answers)", read)
        return dict.fromkeys(pairs, 0.0) | {known[text]: row["answers"] for text, row in rows.items()}

    def _checked(
        self, who: str, texts: Sequence[str], what: str, read: Callable[[Sequence[str]], list[dict[str, Any]]]
    ) -> dict[str, dict[str, Any]]:
        """Text -> what a local check says of it, read in chunks and kept."""
        unique = list(dict.fromkeys(texts))
        with bar(what, len(unique)) as advance:
            for start in range(0, len(unique), CHUNK):
                chunk = unique[start : start + CHUNK]
                if any(self._key(who, text) not in self.kept.rows for text in chunk):
                    rows = zip(chunk, read(chunk), strict=True)
                    self.kept.add({self._key(who, text): {"check": who, **row} for text, row in rows})
                advance(len(chunk))
        return {text: self.kept.rows[self._key(who, text)] for text in unique}

    def _ask(self, judge: EmotionJudge, texts: Sequence[str]) -> dict[str, Opinion]:
        """Asks, keeps the opinions, and returns those that failed."""

        def keep(answers: Mapping[str, Opinion]) -> None:
            known = {text: opinion.probabilities for text, opinion in answers.items() if opinion.probabilities is not None}
            self.kept.add({self._key(judge.key, t): {"judge": judge.key, "probabilities": rounded(p)} for t, p in known.items()})

        one_by_one = judge.key in self.paid
        opinions = judge.opinions(texts, (lambda index, opinion: keep({texts[index]: opinion})) if one_by_one else None)
        answers = dict(zip(texts, opinions, strict=True))
        keep(answers)
        return {text: opinion for text, opinion in answers.items() if opinion.probabilities is None}

    @staticmethod
    def _key(who: str, text: str) -> str:
        return sha256_text(json.dumps([who, text]))


def pair_text(prompt: str, reply: str) -> str:
    """A prompt and a reply as one text, by which what is said of them is kept."""
    return json.dumps([prompt, reply])


def make_jury(spec: str, **options: Any) -> Callable[[KeyedLog], Jury]:
    """The judges that a specification names (see `registry.make_judges`, which takes the options), made at once, so that what is wrong
    with them is said before a model is loaded. Returns where they keep what they say -> jury."""
    from emosteer.judges.registry import JudgeSpec, make_judges, specs_of

    judges = make_judges(spec, **options)
    remote = [JudgeSpec.parse(one).remote for one in specs_of(spec)]
    return jury_of_judges(judges, frozenset(judge.key for judge, paid in zip(judges, remote, strict=True) if paid))


def jury_of_judges(judges: Sequence[EmotionJudge], paid: frozenset[str] = frozenset()) -> Callable[[KeyedLog], Jury]:
    """The same with judges that are made already."""
    from emosteer.judges.answers import AnswerCheck
    from emosteer.judges.embedded import SentenceEncoder, shared_encoder
    from emosteer.judges.soundness import SoundnessCheck

    # one encoder serves all that read with it
    encoders = [getattr(judge, "encoder", None) for judge in judges]
    encoder = next((one for one in encoders if isinstance(one, SentenceEncoder)), None) or shared_encoder()
    soundness, answers = SoundnessCheck.load(encoder=encoder), AnswerCheck.load(encoder=encoder)
    return lambda kept: Jury(tuple(judges), soundness, answers, encoder, kept, paid)


def rounded(shares: Mapping[str, float]) -> dict[str, float]:
    """Probabilities as they are kept: six digits after the point."""
    return {label: round(float(share), 6) for label, share in shares.items()}
