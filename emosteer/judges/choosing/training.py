"""`make chooser`: fits the chooser's heads on replies that models wrote and readers read, and measures them on prompts left out.

How much sense is enough is learned from strict readers alone; whether a reply answers and what it voices from all. Replies to a prompt
that is held out (`judges.sources`), and all of `HELD`, whose prompts are the development set's, are fitted on by nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emosteer.base.artifacts import Provenance, versions
from emosteer.base.errors import EmosteerError
from emosteer.base.files import sha256_file
from emosteer.base.progress import bar
from emosteer.base.tables import print_table
from emosteer.judges.check_training import ReadReply
from emosteer.judges.check_training import read_replies as replies_of
from emosteer.judges.choosing.chooser import ANSWER, ASSET, EMOTION, NO, READER, SENSE, YES, save_chooser
from emosteer.judges.choosing.reading import DEPTHS, feature_weights, read_replies
from emosteer.judges.embedded import LinearHead, fit_head
from emosteer.judges.protocol import LABELS
from emosteer.judges.training import ALSO_STRICTLY, CHECKED, READ, STRICTLY, UNSEEN, tell
from emosteer.models.model import Model
from emosteer.scenarios.scenarios import data_path

#: Replies whose readers were strict about sense; further ones; and those that nothing is fitted on.
STRICT, FURTHER, HELD = (STRICTLY, *ALSO_STRICTLY), (READ, *CHECKED), UNSEEN
#: How far the heads are held back: of sense and of answers, and of emotions, which have more to learn from.
RIDGE, EMOTION_RIDGE = 3e-4, 1e-4
#: Replies that are read between two steps of the bar.
CHUNK = 256


def read_files() -> dict[str, list[tuple[ReadReply, bool]]]:
    """File -> its replies, each with whether it is held out; what is empty is left out.

    Raises:
        DataError: as `check_training.read_replies`.
    """
    found = {}
    for file in (*STRICT, *FURTHER, HELD):
        parts = replies_of(data_path(file))
        found[file] = [(r, part or file == HELD) for part, rows in parts.items() for r in rows if r.pair[1].strip()]
    return found


def features_of(model: Model, replies: Sequence[ReadReply]) -> Tensor:
    """[reply, feature], each pair read once."""
    pairs = list(dict.fromkeys(reply.pair for reply in replies))
    rows: list[Tensor] = []
    with bar("reading (replies)", len(pairs)) as advance:
        for start in range(0, len(pairs), CHUNK):
            rows += read_replies(model, pairs[start : start + CHUNK])
            advance(len(pairs[start : start + CHUNK]))
    known = dict(zip(pairs, rows, strict=True))
    return torch.stack([known[reply.pair] for reply in replies])


def fit(features: Tensor, replies: Sequence[ReadReply], strict: Tensor, fitted: Tensor) -> dict[str, LinearHead]:
    """The three heads.

    Args:
        features: [reply, feature]; strict, fitted: [reply], whether its reader was strict, and whether it is fitted on at all.
    """
    weights, sound = feature_weights(features.shape[1]), fitted & strict
    yes_or_no = (YES, NO)

    def told(name: str) -> Tensor:
        return torch.tensor([0 if getattr(reply, name) else 1 for reply in replies])

    voiced = torch.tensor([LABELS.index(reply.label) for reply in replies])
    return {
        SENSE: fit_head(features[sound], told("sound")[sound], yes_or_no, RIDGE, weights),
        ANSWER: fit_head(features[fitted], told("answers")[fitted], yes_or_no, RIDGE, weights),
        EMOTION: fit_head(features[fitted], voiced[fitted], LABELS, EMOTION_RIDGE, weights),
    }


def area(scores: Tensor, true: Tensor) -> float | None:
    """The area under the curve: how often one that is true has the higher score; a tie counts half. None where all are of one kind."""
    yes, no = scores[true], scores[~true]
    if not len(yes) or not len(no):
        return None
    above = (yes[:, None] > no).float() + 0.5 * (yes[:, None] == no).float()
    return round(above.mean().item(), 4)


def measure(heads: dict[str, LinearHead], features: Tensor, replies: Sequence[ReadReply]) -> dict[str, Any]:
    """What the heads do on replies that were not fitted on: areas under the curve, for sense, answers, and a reply that makes sense and
    answers in the emotion that its reader named; the share of replies whose emotion is named alike."""
    if not replies:
        return {"n": 0}
    shares = {name: heads[name].probabilities(features) for name in heads}
    sense, answer = shares[SENSE][:, 0], shares[ANSWER][:, 0]
    told = {name: torch.tensor([bool(getattr(reply, name)) for reply in replies]) for name in ("sound", "answers")}
    labels = torch.tensor([LABELS.index(reply.label) for reply in replies])
    return {
        "n": len(replies),
        "sense": area(sense, told["sound"]),
        "answers": area(answer, told["answers"]),
        "both": area(sense * answer, told["sound"] & told["answers"]),
        "emotion": round((shares[EMOTION].argmax(-1) == labels).float().mean().item(), 4),
        "readers": {"sense": _share(told["sound"]), "answers": _share(told["answers"]), "both": _share(told["sound"] & told["answers"])},
    }


def _share(values: Tensor) -> float:
    return round(values.float().mean().item(), 4)


def train(out: Path, dtype: str = "auto") -> dict[str, Any]:
    """Reads, fits, measures and writes; returns the card."""
    model, files = Model.load(READER, dtype=dtype), read_files()
    rows = [(file, reply, held) for file, own in files.items() for reply, held in own]
    replies = [reply for _, reply, _ in rows]
    apart = {reply.pair[0] for _, reply, held in rows if held}  # a prompt is held out with all of its replies, in every file
    features = features_of(model, replies)
    fitted = torch.tensor([reply.pair[0] not in apart for reply in replies])
    heads = fit(features, replies, torch.tensor([file in STRICT for file, _, _ in rows]), fitted)
    card = {}
    for file in files:
        held = [i for i, (name, _, _) in enumerate(rows) if name == file and not fitted[i]]
        card[file] = measure(heads, features[held], [replies[i] for i in held])
    provenance = Provenance(
        model.name,
        model.sha256,
        model.template_sha256,
        "linear heads on the states of an unsteered model that reads replies",
        {"dtype": model.precision, "depths": list(DEPTHS), "ridge": RIDGE, "emotion_ridge": EMOTION_RIDGE, "fitted": int(fitted.sum())},
        data={file: sha256_file(data_path(file)) for file in files},
        versions=versions(),
        command="make chooser",
    )
    save_chooser(out, heads, card, provenance)
    return card


def print_card(card: dict[str, Any]) -> None:
    """The card as a table."""
    columns = ("sense", "answers", "both", "emotion")
    rows = [[file, own["n"], *("" if own.get(name) is None else own[name] for name in columns)] for file, own in card.items()]
    title = "on prompts left out: areas under the curve, share of emotions named alike"
    print_table(["replies that were read", "n", *columns], rows, title)


def main() -> None:
    """Fits, writes and prints."""
    parser = argparse.ArgumentParser(description="Fit the chooser's heads on replies that readers read.")
    parser.add_argument("--out", type=Path, default=ASSET)
    parser.add_argument("--dtype", default="auto", help="what the reader computes in, as for `emosteer generate`")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    try:
        card = train(options.out, options.dtype)
    except EmosteerError as error:
        raise SystemExit(f"emosteer: {error}") from error
    tell(card, options.json, options.out, print_card)


if __name__ == "__main__":
    main()
