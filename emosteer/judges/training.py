"""`make judge`: fits the embedded judge's heads on data/judge/ and measures them on texts that were held out.

A seventh of the texts, drawn by their own hash, is never fitted on; the card in the file says how the heads do on it. The broken texts for
the soundness head are made here from the sound ones, so that no broken text has to be collected.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emosteer.base.artifacts import Provenance
from emosteer.base.errors import DataError
from emosteer.base.files import read_jsonl, sha256_file
from emosteer.base.progress import note
from emosteer.base.tables import print_table
from emosteer.judges.embedded import ASSET, ENCODER, LinearHead, SentenceEncoder, fit_head, save_heads
from emosteer.judges.protocol import LABELS
from emosteer.judges.soundness import FAULTS, SOUND, verdicts_of
from emosteer.scenarios.scenarios import data_path
from emosteer.scenarios.splits import stable_share

#: Share of the texts that no head is fitted on.
HELD_OUT = 1 / 7
#: Share of the texts that are broken in each way; the classes are then about as large as the sound one.
SHARE_BROKEN = 0.4
FILES = ("judge/sentences.jsonl", "judge/replies.jsonl")
FOREIGN = "judge/other_languages.jsonl"


@dataclass(frozen=True)
class Example:
    """A judge text. held_out: whether it serves for measuring only."""

    label: str
    register: str
    text: str

    @property
    def held_out(self) -> bool:
        """Decided by the text alone, so that adding texts moves none."""
        return stable_share(f"judge/{self.text}", 0) < HELD_OUT


def read_examples(paths: Sequence[Path]) -> list[Example]:
    """Reads judge texts.

    Raises:
        DataError: naming file and line, if a label is unknown, a text empty, or a text is there twice.
    """
    by_text: dict[str, Example] = {}
    for path in paths:
        for number, row in read_jsonl(path, "judge texts"):
            label, text = row.get("label"), row.get("text")
            if label not in LABELS or not (isinstance(text, str) and text.strip()):
                raise DataError(f"{path}:{number}: expected 'label' to be one of {', '.join(LABELS)} and 'text' a text that is not empty")
            if text in by_text:
                raise DataError(f"{path}:{number}: this text is there twice; a held-out text must not be fitted on")
            by_text[text] = Example(label, str(row.get("register", "")), text)
    return list(by_text.values())


# ---- broken texts ----------------------------------------------------------------------------------------------------------------


def _shuffled(words: list[str], rng: random.Random) -> str:
    rng.shuffle(words)
    return " ".join(words)


def _shuffled_nearby(words: list[str], rng: random.Random) -> str:
    size = rng.randint(3, 6)
    parts = [words[i : i + size] for i in range(0, len(words), size)]
    for part in parts:
        rng.shuffle(part)
    return " ".join(word for part in parts for word in part)


def _half_shuffled(words: list[str], rng: random.Random) -> str:
    middle = len(words) // 3
    rest = words[middle:]
    rng.shuffle(rest)
    return " ".join(words[:middle] + rest)


def _content_only(words: list[str], rng: random.Random) -> str:
    content = [word.strip(".,!?;:\"'") for word in words if len(word) > 4] or words
    return " ".join(rng.choice(content) for _ in range(max(8, len(words))))


def _one_word_again(words: list[str], rng: random.Random) -> str:
    at = rng.randrange(len(words))
    return " ".join(words[:at] + [words[at]] * rng.randint(5, 25) + (words[at + 1 :] if rng.random() < 0.3 else []))


def _loop(words: list[str], rng: random.Random) -> str:
    size = rng.randint(2, 6)
    at = rng.randrange(max(1, len(words) - size))
    return " ".join(words[:at] + words[at : at + size] * rng.randint(3, 8))


def _doubled(words: list[str], rng: random.Random) -> str:
    return " ".join(word for word in words for _ in range(rng.choice((1, 2, 2, 3))))


def _hyphens(words: list[str], rng: random.Random) -> str:
    at, size = rng.randrange(max(1, len(words) // 2)), rng.randint(5, 16)
    chain = "-".join(word.strip(".,!?;:").lower() for word in words[at : at + size])
    return " ".join([*words[:at], chain[: max(8, len(chain) - rng.randint(0, 4))]]) + "-"


def _noise(words: list[str], rng: random.Random) -> str:
    marks = ["!!", "??", "**", "##", "//", "...", "@", "|", "<|", "|>", "&&", "~~", "=="]
    return " ".join(word if rng.random() < 0.5 else word + "".join(rng.choice(marks) for _ in range(rng.randint(1, 3))) for word in words)


def _letters(words: list[str], rng: random.Random) -> str:
    def bent(word: str) -> str:
        inner = list(word)
        rng.shuffle(inner)
        return "".join(inner)

    return " ".join(bent(word) if rng.random() < 0.6 else word for word in words)


def _glued(words: list[str], rng: random.Random) -> str:
    return "".join(word.strip(".,!?").capitalize() + (" " if rng.random() < 0.15 else "") for word in words)


Breaker = Callable[[list[str], random.Random], str]
#: fault -> ways of breaking a text.
BREAKERS: dict[str, tuple[Breaker, ...]] = {
    "order": (_shuffled, _shuffled_nearby, _half_shuffled, _content_only),
    "repetition": (_one_word_again, _loop, _doubled),
    "symbols": (_hyphens, _noise, _letters, _glued),
}


def broken(text: str, fault: str, rng: random.Random) -> str | None:
    """The text, broken in a way of that fault; None where the text is too short to be broken or came out unbroken."""
    words = text.split()
    if len(words) < 6:
        return None
    made = rng.choice(BREAKERS[fault])(list(words), rng)
    return made if made != text and made.split() != words else None


def still_sound(texts: Sequence[str], rng: random.Random) -> list[str]:
    """Other shapes that sound text comes in: two replies in a row, and cut off at a word."""
    longer = [f"{text} {rng.choice(texts)}" for text in texts if rng.random() < 0.5]
    cut = [" ".join(words[: rng.randint(len(words) // 2, len(words) - 1)]) for words in map(str.split, texts) if len(words) > 9]
    return longer + rng.sample(cut, len(cut) // 2)


def soundness_examples(texts: Sequence[str], foreign: Sequence[str], seed: int) -> list[tuple[str, str]]:
    """(label, text) for the soundness head, from sound English texts and texts in other languages."""
    rng = random.Random(seed)
    examples = [(SOUND, text) for text in texts]
    examples += [(SOUND, text) for text in still_sound(texts, rng)]
    for fault in BREAKERS:
        made = ((fault, broken(text, fault, rng)) for text in texts if rng.random() < SHARE_BROKEN)
        examples += [(label, text) for label, text in made if text is not None]
    return examples + [("language", text) for text in foreign]


# ---- fitting and measuring -------------------------------------------------------------------------------------------------------


def measure_emotions(head: LinearHead, features: Tensor, answers: Tensor, registers: Sequence[str]) -> dict[str, Any]:
    """Accuracy (seven-way, and six-way on the emotional ones), macro-F1, confusion, calibration error, and accuracy by register."""
    probabilities = head.probabilities(features)
    guessed = probabilities.argmax(-1)
    right = (guessed == answers).float()
    six = answers < len(LABELS) - 1
    confusion = torch.zeros(len(LABELS), len(LABELS), dtype=torch.long)
    for answer, guess in zip(answers.tolist(), guessed.tolist(), strict=True):
        confusion[answer, guess] += 1
    hits = confusion.diag()
    f1 = 2 * hits / (confusion.sum(0) + confusion.sum(1)).clamp_min(1)
    sure = probabilities.amax(-1)
    bins = [(sure > low / 10) & (sure <= (low + 1) / 10) for low in range(10)]
    gap = sum(abs((sure[b].mean() - right[b].mean()).item()) * b.sum().item() for b in bins if b.any()) / len(answers)
    by = {name: right[[i for i, r in enumerate(registers) if r == name]] for name in sorted(set(registers))}
    return {
        "n": len(answers),
        "accuracy": round(right.mean().item(), 4),
        "accuracy_six_way": round((probabilities[six][:, :-1].argmax(-1) == answers[six]).float().mean().item(), 4),
        "macro_f1": round(f1.mean().item(), 4),
        "expected_calibration_error": round(gap, 4),
        "confusion": {label: dict(zip(LABELS, row.tolist(), strict=True)) for label, row in zip(LABELS, confusion, strict=True)},
        "by_register": {name: {"n": len(hits_of), "accuracy": round(hits_of.mean().item(), 4)} for name, hits_of in by.items()},
    }


def measure_soundness(head: LinearHead, features: Tensor, examples: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """The share of each kind that is called unsound, by head and rules together."""
    verdicts = verdicts_of(head, features, [text for _, text in examples])
    unsound = [not verdict.sound for verdict in verdicts]
    total = Counter(label for label, _ in examples)
    called = Counter(label for (label, _), bad in zip(examples, unsound, strict=True) if bad)
    return {
        label: {"n": total[label], "called_unsound": round(called[label] / total[label], 4)} for label in (SOUND, *FAULTS) if total[label]
    }


def train(paths: Sequence[Path], foreign_path: Path, out: Path) -> dict[str, Any]:
    """Fits both heads, writes them with their card to `out`, and returns the card."""
    examples = read_examples(paths)
    foreign = [str(row["text"]) for _, row in read_jsonl(foreign_path, "texts in other languages")]
    encoder = SentenceEncoder()
    note(f"reading {len(examples)} judge texts")
    features = encoder.features([example.text for example in examples])
    answers = torch.tensor([LABELS.index(example.label) for example in examples])
    held = torch.tensor([example.held_out for example in examples])
    emotion = fit_head(features[~held], answers[~held], LABELS)
    card: dict[str, Any] = {
        "fitted_on": int((~held).sum()),
        "emotions": measure_emotions(emotion, features[held], answers[held], [e.register for e in examples if e.held_out]),
    }
    note("making broken texts and reading them")
    split = {
        part: soundness_examples(
            [e.text for e in examples if e.held_out == part],
            [t for t in foreign if (stable_share(t, 0) < HELD_OUT) == part],
            seed=int(part),
        )
        for part in (False, True)
    }
    shown = {part: encoder.features([text for _, text in labelled]) for part, labelled in split.items()}
    names = (SOUND, *FAULTS)
    soundness = fit_head(shown[False], torch.tensor([names.index(label) for label, _ in split[False]]), names)
    card["soundness"] = measure_soundness(soundness, shown[True], split[True])
    data = {path.name: sha256_file(path) for path in (*paths, foreign_path)}
    provenance = Provenance(ENCODER, "", "", "linear heads on layer statistics", {"held_out": "by the text's hash, 1 in 7"}, data=data)
    save_heads(out, {"emotion": emotion, "soundness": soundness}, card, provenance)
    return card


def main() -> None:
    """Fits, writes and prints."""
    parser = argparse.ArgumentParser(description="Fit the embedded judge's heads on data/judge/.")
    parser.add_argument("--out", type=Path, default=ASSET)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(2)  # sums in a fixed order: the same bits every time on one machine
    card = train([data_path(name) for name in FILES], data_path(FOREIGN), options.out)
    if options.json:
        print(json.dumps(card, indent=2))
        return
    emotions = card["emotions"]
    print(
        f"emotions: {emotions['accuracy']:.1%} of {emotions['n']} held-out texts (seven-way), six-way {emotions['accuracy_six_way']:.1%}, "
        f"macro-F1 {emotions['macro_f1']:.3f}, calibration error {emotions['expected_calibration_error']:.3f}"
    )
    rows = [(label, *row.values()) for label, row in emotions["confusion"].items()]
    print_table(("is \\ judged", *LABELS), rows)
    print_table(("register", "n", "accuracy"), [(name, *row.values()) for name, row in emotions["by_register"].items()])
    print_table(("text", "n", "called unsound"), [(name, *row.values()) for name, row in card["soundness"].items()])
    print(f"wrote {options.out} ({sha256_file(options.out)})")


if __name__ == "__main__":
    main()
