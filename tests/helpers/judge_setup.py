"""Encoders for tests of the judge and of the soundness check: the real one where it is here already, never fetched, and a tiny random one
of the same make."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from emosteer.base import artifacts
from emosteer.base.cache_folder import cache_dir
from emosteer.judges.embedded import ASSET, ENCODER, KIND, SentenceEncoder
from emosteer.models.weights import packages


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
        hidden_size=16,
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
