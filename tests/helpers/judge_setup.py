"""Encoders for tests of the judges and of the checks: the real one where it is here already, never fetched, and a tiny random one of the
same make; heads and adapters that fit the tiny one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from emosteer.base import artifacts
from emosteer.base.artifacts import Provenance
from emosteer.base.cache_folder import cache_dir
from emosteer.judges.adapters import Adapter, linear_layers
from emosteer.judges.embedded import ASSET, ENCODER, KIND, LinearHead, SentenceEncoder
from emosteer.judges.protocol import LABELS
from emosteer.judges.soundness import FAULTS, SENSE, SOUND
from emosteer.models.weights import packages

#: Of files that tests write.
PROVENANCE = Provenance(ENCODER, "", "", "by a test")
#: Of the tiny encoder: of a token's state, and of a text's features (mean and spread of the embeddings and two layers).
WIDTH, FEATURES = 16, 6 * 16


def shipped_adapters() -> list[str]:
    """The fine-tuned judges that the shipped file holds; skips the test where it holds none."""
    names = list(artifacts.load(ASSET, KIND).fields.get("adapters", {}))
    if not names:
        pytest.skip("the shipped judge's file holds no adapters yet: `make judge PUBLIC=FOLDER` fits them")
    return names


def card_of(path: Path = ASSET) -> dict[str, Any]:
    """What was measured when a judge's heads were fitted."""
    return dict(artifacts.load(path, KIND).fields["card"])


@cache
def _real() -> SentenceEncoder | None:
    item = next(item for item in packages.ENCODERS if item.name == ENCODER)
    if not packages._installed(item) and not (cache_dir() / "encoders" / item.sha256[:16]).is_dir():
        return None

    def refused(*_: Any) -> None:
        raise AssertionError(f"{ENCODER} is here but damaged; tests do not fetch it again")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packages, "_download", refused)
        return SentenceEncoder()


def real_encoder() -> SentenceEncoder:
    """The judge's own encoder; skips the test where it is neither installed nor kept from an earlier run."""
    found = _real()
    if found is None:
        pytest.skip(f"{ENCODER} is not on this machine yet and tests do not fetch it; `emosteer judge` does")
    return found


#: One word for each label of the judge, and words that say nothing.
TELLING = {
    "anger": "slam",
    "sadness": "cry",
    "happiness": "sing",
    "fear": "hide",
    "surprise": "blink",
    "disgust": "filth",
    "neutral": "desk",
}
_FILLERS = "i you we it the a my our is was in on at of to and but not what why how"
FILLERS = _FILLERS.split()


def tiny_encoder(seed: int = 0) -> SentenceEncoder:
    """Two random layers over whole words, with what `Encoder` does around them."""
    words = ["[PAD]", "[UNK]", ".", *FILLERS, *TELLING.values()]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=200,
        initializer_range=0.5,
    )
    encoder = SentenceEncoder.__new__(SentenceEncoder)
    encoder.tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", pad_token="[PAD]")
    encoder.model = BertModel(config).eval()
    return encoder


def tiny_heads(seed: int = 0) -> dict[str, LinearHead]:
    """The linear heads of a judge's file, random, for the tiny encoder."""
    draw = torch.Generator().manual_seed(seed)

    def make(labels: tuple[str, ...]) -> LinearHead:
        weight = torch.randn(len(labels), FEATURES, generator=draw).half().float()
        bias = torch.randn(len(labels), generator=draw).half().float()
        return LinearHead(labels, 0.1 * torch.randn(FEATURES, generator=draw), torch.rand(FEATURES, generator=draw) + 0.5, weight, bias)

    return {"emotion": make(LABELS), "soundness": make((SOUND, *FAULTS)), "sense": make((SOUND, SENSE))}


def tiny_adapter(
    labels: Sequence[str] = LABELS, encoder: SentenceEncoder | None = None, layers: int = 1, rank: int = 2, seed: int = 0
) -> Adapter:
    """A random adapter of the last layers of an encoder, the tiny one unless given, and a head; all of it as half precision holds it."""
    draw = torch.Generator().manual_seed(seed)
    model = (encoder or tiny_encoder()).model

    def random(*shape: int, scale: float = 0.3) -> torch.Tensor:
        return (scale * torch.randn(*shape, generator=draw)).half().float()

    places = dict(linear_layers(model, layers))
    down = {path: random(rank, place.in_features) for path, place in places.items()}
    up = {path: random(place.out_features, rank) for path, place in places.items()}
    return Adapter(tuple(labels), down, up, random(len(labels), 2 * model.config.hidden_size), random(len(labels), scale=0.05))
