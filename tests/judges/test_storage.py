"""The judges' file: what comes back, what is refused, and the file that is shipped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from emosteer.base import artifacts
from emosteer.base.errors import ArtifactError
from emosteer.base.files import sha256_file
from emosteer.judges.adapters import TunedJudge
from emosteer.judges.answers import feature_count
from emosteer.judges.embedded import ASSET, KIND, LinearJudge, fit_head
from emosteer.judges.protocol import LABELS
from emosteer.judges.soundness import FAULTS, SENSE, SOUND
from emosteer.judges.storage import load_adapter, load_heads, save_judges
from tests.helpers.judge_setup import PROVENANCE, card_of, real_encoder, shipped_adapters, tiny_adapter, tiny_heads
from tests.helpers.precision import eps_of, product_bound
from tests.judges.test_embedded import clouds


def test_heads_come_back_as_they_were_saved(tmp_path: Path) -> None:
    path, made = tmp_path / "judge.safetensors", tiny_heads()
    save_judges(path, made, {}, {"fitted_on": 3, "deep": {"x": [1.5]}}, PROVENANCE)
    back = load_heads(path)
    assert back.keys() == made.keys()
    for name, head in made.items():
        assert back[name].labels == head.labels
        for part in ("mean", "scale", "weight", "bias"):
            assert torch.equal(getattr(back[name], part), getattr(head, part)), (name, part)
    assert card_of(path) == {"fitted_on": 3, "deep": {"x": [1.5]}}
    again = tmp_path / "again.safetensors"
    save_judges(again, made, {}, {"fitted_on": 3, "deep": {"x": [1.5]}}, PROVENANCE)
    assert sha256_file(again) == sha256_file(path), "the same heads, the same bytes"


def test_a_fitted_head_loses_nothing_by_being_saved(tmp_path: Path) -> None:
    x, answers = clouds(0.6)
    head = fit_head(x, answers, "abc")
    save_judges(tmp_path / "j.safetensors", {"emotion": head}, {}, {}, PROVENANCE)
    back = load_heads(tmp_path / "j.safetensors")["emotion"]
    assert all(torch.equal(getattr(back, part), getattr(head, part)) for part in ("mean", "scale", "weight", "bias"))
    # no probability moves by more than the logits do, and the softmax of up to 1 is off by a few eps itself
    bound = product_bound((x - head.mean) * head.scale, head.weight.T).max() + 4 * eps_of(x.dtype)
    assert (back.probabilities(x) - head.probabilities(x)).abs().max() <= bound


def test_files_that_are_no_judge_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "judge.safetensors"
    with pytest.raises(ArtifactError, match="does not exist"):
        load_heads(path)
    save_judges(path, tiny_heads(), {"tuned": tiny_adapter()}, {}, PROVENANCE)
    whole = artifacts.load(path, KIND)

    def rewritten(name: str, kind: str = KIND, **changes: object) -> Path:
        fields, tensors = {**whole.fields, **changes}, dict(whole.tensors)
        lost = fields.pop("lost", None)
        tensors.pop(lost, None)
        fields.pop(lost, None)
        artifacts.save(tmp_path / name, kind, fields, tensors, PROVENANCE)
        return tmp_path / name

    assert load_heads(rewritten("same")).keys() == {"emotion", "soundness", "sense"}
    with pytest.raises(ArtifactError, match="expected an artefact of kind 'judge', found 'directions'"):
        load_heads(rewritten("kind", "directions"))
    with pytest.raises(ArtifactError, match="reads the encoder minilm-l12, expected all-minilm-l6-v2; run `make judge`"):
        load_heads(rewritten("encoder", encoder="minilm-l12"))
    for lost in ("emotion.bias", "soundness.mean", "labels"):
        with pytest.raises(ArtifactError, match=f"lacks '{lost}'"):
            load_heads(rewritten("part", lost=lost))
    with pytest.raises(ArtifactError, match="reads the encoder None"):
        load_heads(rewritten("part", lost="encoder"))
    with pytest.raises(ArtifactError, match="expected 'labels' to be a valid dictionary, found list"):
        load_heads(rewritten("labels", labels=["emotion"]))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match="damaged"):
        load_heads(path)


def test_an_adapter_that_is_not_there_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "judge.safetensors"
    save_judges(path, tiny_heads(), {"tuned": tiny_adapter()}, {}, PROVENANCE)
    assert load_adapter(path, "tuned").labels == LABELS
    with pytest.raises(ArtifactError, match="holds no judge 'public'; run `make judge`"):
        load_adapter(path, "public")
    whole = artifacts.load(path, KIND)
    artifacts.save(path, KIND, {**whole.fields, "encoder": "minilm-l12"}, dict(whole.tensors), PROVENANCE)
    with pytest.raises(ArtifactError, match="reads the encoder minilm-l12, expected all-minilm-l6-v2"):
        load_adapter(path, "tuned")
    artifacts.save(path, KIND, whole.fields, {n: v for n, v in whole.tensors.items() if n != "tuned:weight"}, PROVENANCE)
    with pytest.raises(ArtifactError, match="lacks 'tuned:weight'"):
        load_adapter(path, "tuned")
    # files of earlier versions hold heads alone
    fields = {name: value for name, value in whole.fields.items() if name != "adapters"}
    artifacts.save(path, KIND, fields, {name: value for name, value in whole.tensors.items() if ":" not in name}, PROVENANCE)
    assert load_heads(path).keys() == {"emotion", "soundness", "sense"}
    with pytest.raises(ArtifactError, match="holds no judge 'tuned'"):
        load_adapter(path, "tuned")


def test_judges_of_similar_names_do_not_mix(tmp_path: Path) -> None:
    """Heads and adapters of one name, and names that begin alike."""
    path = tmp_path / "judge.safetensors"
    adapters = {name: tiny_adapter(seed=seed) for seed, name in enumerate(("emotion", "emotion2", "em"))}
    save_judges(path, tiny_heads(), adapters, {}, PROVENANCE)
    for name, adapter in adapters.items():
        assert load_adapter(path, name).key == adapter.key
    assert load_heads(path)["emotion"].key == tiny_heads()["emotion"].key


# ---- what is shipped -------------------------------------------------------------------------------------------------

PLAIN_CASES = {
    "anger": "How dare they do that to you again! I'm furious, they should be ashamed of themselves.",
    "sadness": "I'm so sorry. I sat there with tears in my eyes and my heart is so heavy.",
    "happiness": "That's wonderful, I'm so happy for you! I'm grinning from ear to ear.",
    "fear": "I'm terrified. My hands are shaking and I don't dare to open the door.",
    "surprise": "Wait, what? I never saw that coming, my jaw just dropped!",
    "disgust": "Ugh, that's revolting, the smell of it turns my stomach.",
    "neutral": "The office is open from nine to five. You can bring the form on Monday.",
}


def test_the_shipped_heads_load() -> None:
    heads = load_heads(ASSET)
    assert heads["emotion"].labels == LABELS and heads["soundness"].labels == (SOUND, *FAULTS)
    assert heads["sense"].labels == (SOUND, SENSE)
    states = 2 * 7 * 384  # mean and spread, six layers and the embeddings
    pairs = feature_count(real_encoder())
    for name, width in (("emotion", states), ("soundness", states), ("sense", states), ("answers", pairs)):
        assert heads[name].weight.shape == (len(heads[name].labels), width) and heads[name].mean.shape == (width,)


def test_the_shipped_linear_judge_hears_plain_cases() -> None:
    judge = LinearJudge(real_encoder(), load_heads(ASSET)["emotion"])
    assert [opinion.emotion() for opinion in judge.opinions(list(PLAIN_CASES.values()))] == list(PLAIN_CASES)


def test_the_shipped_adapters_fit_their_encoder() -> None:
    assert set(shipped_adapters()) == {"embedded", "public"}
    for name in shipped_adapters():
        judge = TunedJudge.of(real_encoder(), load_adapter(ASSET, name), name)
        assert judge.labels == LABELS
    assert ASSET.stat().st_size < 8 * 10**6, "it travels in the package"


@pytest.mark.parametrize("name", ["embedded", "public"])
def test_the_shipped_fine_tuned_judges_hear_plain_cases(name: str) -> None:
    if name not in shipped_adapters():
        pytest.fail(f"{ASSET} holds no judge '{name}'")
    judge = TunedJudge.of(real_encoder(), load_adapter(ASSET, name), name)
    assert [opinion.emotion() for opinion in judge.opinions(list(PLAIN_CASES.values()))] == list(PLAIN_CASES)
