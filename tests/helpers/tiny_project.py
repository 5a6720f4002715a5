"""A project in a folder: a tiny model, scenarios and a reply bank, as files that the commands and the API take."""

from __future__ import annotations

import json
from pathlib import Path

from tests.conftest import build

EMOTIONS = ("anger", "sadness", "fear")
WORDS = {"anger": "slam stop boss never", "sadness": "cry alone never home", "fear": "hide run shake door"}


def write_tiny_project(root: Path, family: str = "llama") -> None:
    """Writes `tiny/` (the model), `sev.jsonl` and `bank.jsonl`."""
    model = build(family)
    model.hf.save_pretrained(root / "tiny")
    model.tokenizer.save_pretrained(root / "tiny")
    places = ["office", "train", "flat", "desk", "door", "home"]
    with (root / "sev.jsonl").open("w") as file, (root / "bank.jsonl").open("w") as bank:
        for index, place in enumerate(places):
            events = {"positive": f"the {place} came back", "neutral": f"the {place} was late", "negative": f"the {place} went home"}
            file.write(
                json.dumps({"skeleton_id": f"s{index}", "theme": f"t{index % 2}", "scenario": f"i waited at the {place}", "event": events})
                + "\n"
            )
            for valence in events:
                for emotion in EMOTIONS:
                    row = {
                        "skeleton_id": f"s{index}",
                        "valence": valence,
                        "emotion": emotion,
                        "text": f"the {place} {WORDS[emotion]} {valence[0]}",
                    }
                    bank.write(json.dumps(row) + "\n")
