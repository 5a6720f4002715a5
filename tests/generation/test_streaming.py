"""Streaming: the pieces of every row of a batch join to its reply, whatever the tokenizer makes of half a character."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from emosteer.generation.generate import Decoding, Request, generate
from emosteer.generation.steering import plan_for
from emosteer.generation.streaming import Piece, RowText, stream
from emosteer.models.model import Model
from emosteer.models.sites import Site
from emosteer.models.tokens import reply_text

PROMPTS = ((1, 7, 9, 12, 30, 41, 4), (1, 8, 20, 4), (1, 50, 33, 21, 17, 60, 44, 13, 3, 4), (1, 70, 4), (1, 30, 31, 32, 4))
EIGHT = [Request(f"row{index}", PROMPTS[index % 5]) for index in range(8)]


def byte_level() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are bytes, as GPT-2 writes them, and one special token behind them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({char: index for index, char in enumerate(alphabet)}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>")


def byte_fallback() -> PreTrainedTokenizerFast:
    """A tokenizer of words and bytes, as Gemma's and Llama 2's: a run of bytes that is no text is no text from its start."""
    words = ["<unk>", "\u2581the", "\u2581sea", "\u2581", "."]
    vocab = {word: index for index, word in enumerate([*words, *(f"<0x{value:02X}>" for value in range(256))])}
    core = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    core.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


def with_tokenizer(monkeypatch: pytest.MonkeyPatch, model: Model, tokenizer: Any) -> None:
    """Another reading of the same token ids."""
    monkeypatch.setattr(model, "tokenizer", tokenizer)
    monkeypatch.setitem(model.__dict__, "stop_ids", frozenset({3}))


def texts(pieces: Iterable[Piece], rows: int) -> list[tuple[str, str]]:
    """The joined text and the reason of every row; the last piece of a row, and no other, gives the reason."""
    found = [list[Piece]() for _ in range(rows)]
    for piece in pieces:
        assert not found[piece.row] or found[piece.row][-1].finish_reason is None, "a piece after the last one"
        assert piece.text or piece.finish_reason, "an empty piece in the middle"
        found[piece.row].append(piece)
    return [("".join(piece.text for piece in row), str(row[-1].finish_reason)) for row in found]


# ---- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("readable", ["words", "bytes"])
@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_the_stream_of_a_batch_of_mixed_emotions_joins_to_its_replies(
    family: Model, monkeypatch: pytest.MonkeyPatch, temperature: float, readable: str
) -> None:
    with_tokenizer(monkeypatch, family, byte_level() if readable == "bytes" else family.tokenizer)
    draw = torch.Generator().manual_seed(0)
    vectors = {Site(layer, "attn_out"): torch.randn(3, family.shape.d_model, generator=draw) for layer in range(3)}
    plan = plan_for(vectors, [0, 1, 2, -1, 0, 1, 2, 0], [1.0, 0.5, 2.0, 0.0, -1.0, 0.2, 0.7, 0.0])
    decoding = Decoding(20, temperature=temperature, repetition_penalty=1.3, seed=4)
    replies, pieces = generate(family, EIGHT, plan, decoding), list(stream(family, EIGHT, plan, decoding))
    assert texts(pieces, 8) == [(reply.text, reply.finish_reason) for reply in replies]
    assert len({reply.text for reply in replies}) > 4
    order = [piece.row for piece in pieces]
    assert order != sorted(order), "the rows come one beside the other, not one after the other"
    for row, request in enumerate(EIGHT):
        alone = list(stream(family, [request], plan.rows([row]), decoding))
        assert [(piece.text, piece.finish_reason) for piece in alone] == [(p.text, p.finish_reason) for p in pieces if p.row == row]


def test_words_come_one_by_one(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiny.__dict__, "stop_ids", frozenset())
    pieces = list(stream(tiny, EIGHT[:1], decoding=Decoding(max_new_tokens=12)))
    assert len(pieces) == 12 and [piece.finish_reason for piece in pieces] == [None] * 11 + ["length"]


def test_a_reply_of_nothing_is_one_empty_piece(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    first = generate(tiny, EIGHT[:1], decoding=Decoding(max_new_tokens=1))[0].ids[0]
    monkeypatch.setitem(tiny.__dict__, "stop_ids", frozenset({first}))
    assert list(stream(tiny, EIGHT[:1])) == [Piece(0, "", "stop")]
    assert list(stream(tiny, [])) == []


def test_an_early_end_of_the_stream_ends_the_generation(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    from emosteer.generation import streaming

    usual, columns = streaming.steps, []
    monkeypatch.setattr(streaming, "steps", lambda *rest: columns.append(usual(*rest)) or columns[-1])
    monkeypatch.setitem(tiny.__dict__, "stop_ids", frozenset())
    pieces = stream(tiny, EIGHT)
    next(pieces)
    assert columns[0].gi_frame is not None
    pieces.close()
    assert columns[0].gi_frame is None, "the generation was closed as well"


# ---- characters ------------------------------------------------------------------------------------------------------

TEXTS = ["Zoë ging — naar huis 😀!", "  spaces around \n ", "ends in the middle: é", "", "   ", "日本語のテキスト", "👩‍👩‍👧 family"]


def pushed(tokenizer: Any, ids: list[int]) -> list[str]:
    """What was sent after each token, and in the end."""
    row = RowText(tokenizer)
    return [*(row.push(token) for token in ids), row.rest()]


@pytest.mark.parametrize("text", TEXTS)
def test_incomplete_characters_and_white_space_are_held_back(text: str) -> None:
    tokenizer = byte_level()
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    sent = ""
    for end, piece in enumerate(pushed(tokenizer, ids)[:-1], 1):
        sent += piece
        whole = text.encode()[:end]
        if whole.decode(errors="replace") == whole.decode(errors="ignore"):
            assert sent == whole.decode().strip(), "what is complete is sent at once"
        assert text.strip().startswith(sent), "a piece was sent that the text does not hold"
    assert sent + pushed(tokenizer, ids)[-1] == text.strip()


def test_a_reply_cut_within_a_character_still_joins_to_its_text() -> None:
    tokenizer = byte_level()
    ids = tokenizer("caf\u00e9")["input_ids"][:-1]
    assert pushed(tokenizer, ids) == ["c", "a", "f", "", "\ufffd"]


@pytest.mark.parametrize("kind", [byte_level, byte_fallback])
def test_any_tokens_at_all_join_to_their_text(kind: Any) -> None:
    """Random bytes are mostly no text; special tokens are among them."""
    tokenizer, draw = kind(), torch.Generator().manual_seed(0)
    broken = 0
    for _ in range(300):
        ids = torch.randint(len(tokenizer), (12,), generator=draw).tolist()
        expected = reply_text(tokenizer, ids)
        broken += "\ufffd" in expected
        assert "".join(pushed(tokenizer, ids)) == expected
    assert broken > 0


def test_a_run_of_bytes_waits_until_it_can_change_no_more() -> None:
    tokenizer = byte_fallback()
    sea, broken = tokenizer.convert_tokens_to_ids(["\u2581sea", "<0xC3>", "<0xA9>"]), tokenizer.convert_tokens_to_ids("<0xFF>")
    assert pushed(tokenizer, [*sea, sea[0], broken])[:-1] == ["sea", "", "", "\u00e9 sea", ""]
    spoiled = [*sea, broken]
    assert "".join(pushed(tokenizer, spoiled)) == reply_text(tokenizer, spoiled) == "sea\ufffd\ufffd\ufffd"
