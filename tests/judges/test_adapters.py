"""Adapters: what merging does to which weights, what is shared, the judge that reads with them, and parts that do not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from emosteer.base.errors import ArtifactError
from emosteer.judges.adapters import Adapter, TunedJudge, linear_layers, merged, pooled
from emosteer.judges.embedded import SentenceEncoder
from emosteer.judges.protocol import LABELS, Opinion
from emosteer.judges.storage import load_adapter, save_judges
from tests.helpers.judge_setup import PROVENANCE, WIDTH, tiny_adapter, tiny_encoder

TEXTS = ["cry we was not", "i slam the desk and the desk and it", "sing", "", "why hide why hide in the filth of it . not what we was"]
LINEAR = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)


@pytest.fixture(scope="module")
def encoder() -> SentenceEncoder:
    return tiny_encoder()


@pytest.fixture
def adapter(encoder: SentenceEncoder) -> Adapter:
    return tiny_adapter(encoder=encoder)


# ---- merging -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layers", "first"), [(1, 1), (2, 0), (0, 2)])
def test_the_linear_maps_of_the_last_layers_are_adapted(encoder: SentenceEncoder, layers: int, first: int) -> None:
    paths = [path for path, _ in linear_layers(encoder.model, layers)]
    assert paths == [f"encoder.layer.{layer}.{name}" for layer in range(first, 2) for name in LINEAR]


def test_every_adapted_weight_is_itself_and_up_times_down(encoder: SentenceEncoder, adapter: Adapter) -> None:
    tuned = merged(encoder.model, adapter)
    before, after = encoder.model.state_dict(), tuned.state_dict()
    assert before.keys() == after.keys() and len(adapter.down) == len(LINEAR)
    for name, weight in before.items():
        path = name.removesuffix(".weight")
        if path in adapter.down:
            outer = sum(torch.outer(adapter.up[path][:, r], adapter.down[path][r]) for r in range(2))
            torch.testing.assert_close(after[name], weight + outer, atol=1e-6, rtol=1e-6)
            assert (after[name] - weight).abs().max() > 0.05
        else:
            assert torch.equal(after[name], weight), f"{name} is not adapted"


def test_what_is_not_adapted_is_shared_and_the_encoder_stays_as_it_was(adapter: Adapter) -> None:
    encoder = tiny_encoder()
    before = {name: weight.clone() for name, weight in encoder.model.state_dict().items()}
    embeddings = encoder(TEXTS)
    tuned = merged(encoder.model, adapter)
    assert tuned is not encoder.model and tuned.embeddings is encoder.model.embeddings
    assert tuned.encoder.layer[0] is encoder.model.encoder.layer[0] and tuned.encoder.layer[1] is not encoder.model.encoder.layer[1]
    assert all(torch.equal(weight, before[name]) for name, weight in encoder.model.state_dict().items())
    assert torch.equal(encoder(TEXTS), embeddings)
    assert not any(tuned.get_submodule(path).weight.requires_grad for path in adapter.down)


def test_adapters_of_another_encoder_are_refused(encoder: SentenceEncoder, adapter: Adapter) -> None:
    before = {name: weight.clone() for name, weight in encoder.model.state_dict().items()}
    path = next(iter(adapter.down))

    def changed(where: str, down: Tensor, up: Tensor) -> Adapter:
        return replace(adapter, down={where: down}, up={where: up})

    rank_one = torch.ones(1, WIDTH), torch.ones(WIDTH, 1)
    for where, down, up in (
        ("encoder.layer.5.output.dense", *rank_one),  # a deeper encoder
        (path, torch.ones(1, 2 * WIDTH), torch.ones(2 * WIDTH, 1)),  # a wider one
        (path, torch.ones(1, 1), torch.ones(1, 1)),  # could be added to any weight
        ("embeddings.word_embeddings", *rank_one),  # shared with the encoder, which would change
        ("encoder.layer.1.output.LayerNorm", *rank_one),
    ):
        with pytest.raises(ArtifactError, match=rf"does not fit this encoder at {where}; run `make judge`"):
            merged(encoder.model, changed(where, down, up))
    with pytest.raises(ArtifactError, match="head does not fit this encoder"):
        merged(encoder.model, replace(adapter, weight=torch.ones(len(LABELS), WIDTH)))
    assert all(torch.equal(weight, before[name]) for name, weight in encoder.model.state_dict().items())


# ---- reading -------------------------------------------------------------------------------------------------------


def test_pooled_states_are_mean_and_maximum_over_the_tokens() -> None:
    states = torch.tensor([[[1.0, -3.0], [3.0, -1.0], [9.0, 9.0]], [[-5.0, -2.0], [8.0, 8.0], [8.0, 8.0]]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert pooled(states, mask).tolist() == [[2.0, -2.0, 3.0, -1.0], [-5.0, -2.0, -5.0, -2.0]]


@torch.no_grad()
def by_hand(encoder: SentenceEncoder, adapter: Adapter, text: str) -> Tensor:
    """One text alone, through an encoder whose adapted layers add `up(down(x))` beside their own output."""
    model = tiny_encoder().model
    model.load_state_dict(encoder.model.state_dict())
    for path, down in adapter.down.items():

        def added(_: nn.Module, inputs: tuple[Tensor], output: Tensor, path: str = path, down: Tensor = down) -> Tensor:
            return output + inputs[0] @ down.T @ adapter.up[path].T

        model.get_submodule(path).register_forward_hook(added)
    states = model(input_ids=encoder.tokenizer(text or ".", return_tensors="pt").input_ids).last_hidden_state[0]
    return (torch.cat([states.mean(0), states.amax(0)]) @ adapter.weight.T + adapter.bias).softmax(-1)


def test_the_judge_reads_what_adapters_beside_the_layers_would(encoder: SentenceEncoder, adapter: Adapter) -> None:
    """Each text alone, unpadded, with nothing merged; whatever stands beside it in the batch."""
    judge = TunedJudge.of(encoder, adapter, "tuned")
    rows = judge.probabilities(TEXTS)
    wanted = torch.stack([by_hand(encoder, adapter, text) for text in TEXTS])
    torch.testing.assert_close(rows, wanted, atol=1e-5, rtol=0)
    without = TunedJudge.of(encoder, replace(adapter, down={}, up={}), "plain").probabilities(TEXTS)
    assert (rows - without).abs().max() > 0.05, "the adapters matter"
    assert judge.probabilities([]).shape == (0, 7) and judge.opinions([]) == []


def test_opinions_are_told_one_by_one(encoder: SentenceEncoder, adapter: Adapter) -> None:
    told = list[tuple[int, Opinion]]()
    judge = TunedJudge.of(encoder, adapter, "tuned")
    opinions = judge.opinions(TEXTS, lambda index, opinion: told.append((index, opinion)))
    assert told == list(enumerate(opinions)) and judge.labels == LABELS
    for opinion, row in zip(opinions, judge.probabilities(TEXTS), strict=True):
        assert opinion.probabilities == {label: round(share, 6) for label, share in zip(LABELS, row.tolist(), strict=True)}


# ---- the key and the file ------------------------------------------------------------------------------------------


def test_the_key_follows_every_part(adapter: Adapter, encoder: SentenceEncoder) -> None:
    path = next(iter(adapter.down))
    others = [
        replace(adapter, down={**adapter.down, path: adapter.down[path] + 0.5}),
        replace(adapter, up={**adapter.up, path: adapter.up[path] + 0.5}),
        replace(adapter, weight=adapter.weight + 0.5),
        replace(adapter, bias=adapter.bias + 0.5),
    ]
    assert len({one.key for one in [adapter, *others]}) == 5 and replace(adapter).key == adapter.key
    assert TunedJudge.of(encoder, adapter, "tuned").key == f"tuned-{adapter.key}"


def test_saved_and_loaded_it_has_the_same_bytes_and_opinions(tmp_path: Path, encoder: SentenceEncoder, adapter: Adapter) -> None:
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    other = tiny_adapter(("yes", "no"), encoder=encoder, seed=1)
    save_judges(first, {}, {"tuned": adapter, "other": other}, {}, PROVENANCE)
    back = {name: load_adapter(first, name) for name in ("tuned", "other")}
    save_judges(second, {}, back, {}, PROVENANCE)
    assert first.read_bytes() == second.read_bytes() and back["other"].labels == ("yes", "no")
    assert back["tuned"].key == adapter.key and back["other"].key == other.key
    for name, one in (("tuned", adapter), ("other", other)):
        assert torch.equal(
            TunedJudge.of(encoder, one, name).probabilities(TEXTS), TunedJudge.of(encoder, back[name], name).probabilities(TEXTS)
        )


def test_missing_and_misfitting_parts_are_refused(adapter: Adapter) -> None:
    tensors = adapter.tensors()
    path = next(iter(adapter.down))
    assert Adapter.of(LABELS, tensors).key == adapter.key
    for part in ("weight", "bias"):
        with pytest.raises(ArtifactError, match=f"the judge's adapter lacks '{part}'; run `make judge`"):
            Adapter.of(LABELS, {name: value for name, value in tensors.items() if name != part})
    for bad in (
        {name: value for name, value in tensors.items() if name != f"up.{path}"},
        {name: value for name, value in tensors.items() if name != f"down.{path}"},
        {**tensors, f"up.{path}": torch.ones(WIDTH, 3)},
        {**tensors, f"up.{path}": torch.ones(WIDTH)},
        {**tensors, f"down.{path}": torch.tensor(1.0)},
        {**tensors, "bias": torch.ones(6)},
        {**tensors, "bias": torch.ones(7, 1)},
        {**tensors, "weight": torch.ones(7)},
    ):
        with pytest.raises(ArtifactError, match="do not fit each other; run `make judge`"):
            Adapter.of(LABELS, bad)
    with pytest.raises(ArtifactError, match="do not fit each other"):
        Adapter.of(LABELS[:-1], tensors)
