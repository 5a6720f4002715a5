"""A judge from any Hugging Face text-classification model: its labels mapped to ours by name. Reads safetensors only."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emosteer.base.cache_folder import remembered_sha256, silent
from emosteer.base.errors import ModelError, UsageError, first_line
from emosteer.base.files import sha256_file, sha256_text
from emosteer.base.progress import note
from emosteer.judges.protocol import LABELS, Opinion
from emosteer.models.devices import resolve_device
from emosteer.models.memory import halve_on_oom, is_out_of_memory
from emosteer.models.weights.resolve import Weights, resolve
from emosteer.scenarios.scenarios import EMOTIONS, NEUTRAL

#: Label names of the usual emotion datasets -> ours. It follows the grouping that the authors of GoEmotions published, except that
#: approval, caring, desire, curiosity and realization stay out: an answer shows these whatever it feels.
_NAMES = {
    "anger": "anger angry annoyance annoyed disapproval frustration frustrated fury furious rage irritation irritated mad hate",
    "sadness": "sadness sad grief disappointment disappointed remorse sorrow loneliness lonely despair devastated depressed depression "
    "pessimism embarrassment embarrassed shame ashamed guilt guilty hurt suffering unhappy",
    "happiness": "happiness happy joy joyful amusement amused excitement excited gratitude grateful love optimism optimistic relief "
    "relieved pride proud admiration contentment content delight enthusiasm fun cheerfulness cheerful pleasure hope hopeful",
    "fear": "fear fearful afraid scared terrified terror nervousness nervous worry worried anxiety anxious dread apprehensive panic",
    "surprise": "surprise surprised astonishment astonished amazement amazed shock shocked confusion confused",
    "disgust": "disgust disgusted revulsion contempt loathing",
}
#: Label of ours -> names of it elsewhere.
SYNONYMS: Mapping[str, tuple[str, ...]] = {label: tuple(names.split()) for label, names in _NAMES.items()} | {
    NEUTRAL: ("neutral", "none", "no emotion", "no feeling", "without emotion", "other", "others", "calm")
}
_OURS = {name: label for label, names in SYNONYMS.items() for name in names}
LEAST_MAPPED = 4
LONGEST = 512
BATCH = 32


def our_label(name: str) -> str | None:
    """The label of ours that a classifier's label means, or None: "Joy", "no_emotion", "anger/annoyance", "sadness 😥"."""
    plain = " ".join(re.sub(r"[^a-z/,|&+]", " ", name.lower()).split())
    parts = [plain, *(part.strip() for part in re.split(r"[/,|&+]| and | or ", plain))]
    if plain in _OURS:
        return _OURS[plain]
    meant = {_OURS.get(part) for part in parts[1:] if part}
    return meant.pop() if len(meant) == 1 else None


@dataclass(frozen=True)
class Mapped:
    """A classifier's labels in our terms. columns: label of ours -> columns of the logits; multi_label: a text may have several; notes:
    what is ignored and what is missing."""

    columns: Mapping[str, tuple[int, ...]]
    multi_label: bool
    notes: tuple[str, ...]

    @classmethod
    def of(cls, labels: Sequence[str], multi_label: bool, name: str) -> Mapped:
        """Maps labels, given in the order of the logits.

        Raises:
            ModelError: listing them, if they cover fewer than LEAST_MAPPED of the six emotions.
        """
        meant = [our_label(label) for label in labels]
        columns = {label: tuple(i for i, one in enumerate(meant) if one == label) for label in LABELS if label in meant}
        covered = [emotion for emotion in EMOTIONS if emotion in columns]
        if len(covered) < LEAST_MAPPED:
            shown = ", ".join(labels[:40]) + (", ..." if len(labels) > 40 else "")
            raise ModelError(
                f"expected labels for at least {LEAST_MAPPED} of {', '.join(EMOTIONS)}, found {len(covered)} in {name} ({shown}); "
                f"choose an emotion classifier, or name its labels in id2label of its config.json"
            )
        ignored = [label for label, ours in zip(labels, meant, strict=True) if ours is None]
        missing = [label for label in LABELS if label not in columns and not (multi_label and label == NEUTRAL)]
        notes = [f"{name}: labels that are none of ours are ignored: {', '.join(ignored)}"] if ignored else []
        notes += [f"{name} has no label for {', '.join(missing)}: always 0"] if missing else []
        return cls(columns, multi_label, tuple(notes))

    def shares(self, logits: Tensor) -> Tensor:
        """[text, LABELS] from logits [text, column]; every row sums to 1.

        One label per text: a softmax over the mapped columns, added up per label of ours. Several: the strongest sigmoid per label of
        ours, so that a label with many names has no head start; where none means neutral, neutral is that nothing is there.
        """
        logits = logits.double()
        shares = torch.zeros(len(logits), len(LABELS), dtype=torch.float64)
        if self.multi_label:
            present = logits.sigmoid().clamp(min=1e-12)
            for label, columns in self.columns.items():
                shares[:, LABELS.index(label)] = present[:, list(columns)].amax(1)
            if NEUTRAL not in self.columns:
                shares[:, LABELS.index(NEUTRAL)] = (1 - shares).prod(1)
        else:
            used = sorted(column for columns in self.columns.values() for column in columns)
            share = logits[:, used].softmax(1)
            for label, columns in self.columns.items():
                shares[:, LABELS.index(label)] = share[:, [used.index(column) for column in columns]].sum(1)
        return shares / shares.sum(1, keepdim=True)


@dataclass(frozen=True, eq=False)
class HfJudge:
    """name: "hf:ID"; key: hash of weights, configuration, tokenizer and mapping; notes: what its labels lack; weights: their hashes."""

    name: str
    key: str
    notes: tuple[str, ...]
    weights: frozenset[str]
    mapped: Mapped
    model: Any
    tokenizer: Any

    @classmethod
    def load(cls, reference: str, device: str = "auto") -> HfJudge:
        """Loads a classifier by folder or hub id and says what its labels lack.

        Raises:
            ModelError: if it cannot be found, fetched or trusted, is no classifier, or its labels are not emotions.
            UsageError: if the device is not there.
        """
        target = resolve_device(device)
        if not Path(reference).expanduser().is_dir() and "/" not in reference:
            raise ModelError(
                f"expected a text-classification model as hub id (org/name) or folder, found '{reference}'; is it ./{reference}?"
            )
        classifier = resolve(reference, progress=note)
        config, tokenizer, model = _loaded(classifier, target)
        labels = [str(config.id2label[index]) for index in range(config.num_labels)]
        mapped = Mapped.of(labels, config.problem_type == "multi_label_classification", classifier.name)
        for line in mapped.notes:
            note(line)
        digests = _digests(classifier)
        key = sha256_text(repr([classifier.sha256, digests, sorted(mapped.columns.items()), LONGEST]))[:16]
        weights = frozenset([classifier.sha256, *(digest for name, digest in digests if name.endswith(".safetensors"))])
        return cls(f"hf:{classifier.name}", key, mapped.notes, weights, mapped, model, tokenizer)

    @torch.no_grad()
    def opinions(self, texts: Sequence[str], done: Callable[[int, Opinion], None] | None = None) -> list[Opinion]:
        """One opinion per text, in order; texts of similar length are judged together, cut off at what the model can read.

        Raises:
            OutOfMemory: if not even one text fits.
        """
        opinions: list[Opinion] = [Opinion(None, "not judged")] * len(texts)

        def compute(index: list[int]) -> list[tuple[int, list[float]]]:
            batch = [texts[i] or " " for i in index]
            tokens = self.tokenizer(batch, padding=True, truncation=True, max_length=self.longest, return_tensors="pt")
            logits = self.model(**{name: tokens[name].to(self.model.device) for name in ("input_ids", "attention_mask")}).logits
            return list(zip(index, self.mapped.shares(logits.float().cpu()).tolist(), strict=True))

        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in range(0, len(order), BATCH):
            for part in halve_on_oom(order[start : start + BATCH], compute, note, "texts"):
                for i, shares in part:
                    sane = all(math.isfinite(share) for share in shares)
                    opinions[i] = Opinion(dict(zip(LABELS, shares, strict=True))) if sane else Opinion(None, f"{self.name} gave no numbers")
                    if done is not None:
                        done(i, opinions[i])
        return opinions

    @property
    def longest(self) -> int:
        """Tokens that are read. RoBERTa counts its positions from 2, hence the margin."""
        positions = getattr(self.model.config, "max_position_embeddings", None) or LONGEST + 2
        return min(LONGEST, int(self.tokenizer.model_max_length), positions - 2)


def refuse_same_weights(judges: Sequence[object], model_sha256: str) -> None:
    """A judge that shares its weights with the steered model would judge itself.

    Raises:
        UsageError: if a judge's weights are the steered model's.
    """
    for judge in judges:
        if model_sha256 in getattr(judge, "weights", ()):
            name = getattr(judge, "name", "")
            raise UsageError(f"judge {name} has the weights of the steered model itself; choose an independent one, e.g. --judge embedded")


def _loaded(classifier: Weights, device: torch.device) -> tuple[Any, Any, Any]:
    """(config, tokenizer, model), with every weight of the model out of the files."""
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging as untyped

    hf_logging: Any = untyped
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    local = {"local_files_only": True}
    try:
        config: Any = AutoConfig.from_pretrained(classifier.path, trust_remote_code=False, **local)
        tokenizer: Any = AutoTokenizer.from_pretrained(classifier.path, trust_remote_code=False, **local)
        options = {"config": config, "dtype": torch.float32, "output_loading_info": True, **local}
        model, info = AutoModelForSequenceClassification.from_pretrained(
            classifier.path, use_safetensors=True, trust_remote_code=False, **options
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(f"cannot load {classifier.name} as a text classifier: {first_line(error)}") from error
    if lost := sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"]):
        # transformers would fill them with random numbers
        raise ModelError(
            f"{classifier.name} is no text-classification model: its weights lack {lost[0]}; choose one that was trained as such"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return config, tokenizer, model.to(device).eval()


def _digests(classifier: Weights) -> list[tuple[str, str]]:
    """(name, sha256) of every file that shapes an opinion."""
    weights = [(file.name, remembered_sha256(file, silent)) for file in sorted(classifier.path.glob("*.safetensors"))]
    small = sorted(file for pattern in ("*.json", "*.txt", "*.model") for file in classifier.path.glob(pattern))
    return weights + [(file.name, sha256_file(file)) for file in small]
