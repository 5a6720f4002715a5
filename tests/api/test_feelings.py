"""Mixtures, arcs, negative intensities and what changes over turns, through the API and the command, on a tiny model with a dial."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from emosteer.api.steered_model import SteeredModel
from emosteer.base.errors import ArtifactError, UsageError
from emosteer.cli import main as cli
from emosteer.generation.decoding import Decoding
from emosteer.generation.generate import generate
from emosteer.generation.steering import SteeringPlan
from tests.helpers.dialled import TOP, dialled_model

TEXT = "the boss said stop"
SHORT = dict(max_new_tokens=10)
CHAT = [
    {"role": "user", "content": "the train was late"},
    {"role": "assistant", "content": "which train"},
    {"role": "user", "content": TEXT},
]


@pytest.fixture(scope="module")
def steered() -> SteeredModel:
    return dialled_model()


def by_hand(steered: SteeredModel, prompt: Any, strengths: dict[str, float]) -> tuple[int, ...]:
    """The reply under the sum of the emotions' vectors, each times its strength."""
    assert steered.circuit is not None
    weights = torch.tensor([strengths.get(emotion, 0.0) for emotion in steered.emotions])
    vectors = {site: (weights @ value)[None] for site, value in steered.circuit.steering(steered.model).items()}
    requests = steered._work(prompt, None, {}).requests
    return generate(steered.model, requests, SteeringPlan(vectors, 1), Decoding.usual(max_new_tokens=10))[0].ids


def test_a_mixture_adds_each_emotion_at_the_strength_of_its_dial(steered: SteeredModel) -> None:
    found = steered.generate(TEXT, mix={"anger": 50, "fear": -20}, **SHORT)
    assert found.ids == by_hand(steered, TEXT, {"anger": TOP * 0.5, "fear": -TOP * 0.1}), "less of an emotion takes half of the dial"
    assert found.ids != steered.generate(TEXT, **SHORT).ids
    assert steered.generate(TEXT, mix="anger:50 + fear:-20", **SHORT).ids == found.ids
    assert steered.generate(TEXT, "anger", intensity=50, **SHORT).ids == steered.generate(TEXT, mix="anger:50", **SHORT).ids
    assert steered.generate(TEXT, "anger", intensity=-50, **SHORT).ids == by_hand(steered, TEXT, {"anger": -TOP / 4})
    assert steered.generate(TEXT, mix="neutral", **SHORT).ids == steered.generate(TEXT, **SHORT).ids
    assert "".join(steered.stream(TEXT, mix="anger:50 + fear:-20", **SHORT)) == found.text


def test_too_much_together_is_weakened_and_said(steered: SteeredModel, capsys: pytest.CaptureFixture[str]) -> None:
    found = steered.generate(TEXT, mix="anger:100 + fear:100", **SHORT)
    assert found.ids == by_hand(steered, TEXT, {"anger": TOP / 2, "fear": TOP / 2})
    assert "weakened to 'anger:50 + fear:50'" in capsys.readouterr().err


def test_an_arc_begins_and_ends_where_it_says(steered: SteeredModel) -> None:
    jobs = steered._work([TEXT] * 2, None, {"arc": "anger:100 -> fear:50", "arc_tokens": 5, **SHORT})  # type: ignore[typeddict-item]
    course = torch.tensor(jobs.jobs[0].course)
    assert course.shape == (5, 6) and jobs.jobs[0].id == "line-1/anger:100 -> fear:50 in 5 tokens"
    assert course[:, 0].tolist() == pytest.approx([TOP * share for share in (1, 0.75, 0.5, 0.25, 0)])
    assert course[:, 3].tolist() == pytest.approx([TOP * share / 8 for share in range(5)])
    replies = steered.generate([TEXT, CHAT], arc="anger:100 -> fear:50", arc_tokens=5, **SHORT)
    assert replies[0].ids == steered.generate(TEXT, arc="anger:100 -> fear:50", arc_tokens=5, **SHORT).ids
    assert replies[0].ids != steered.generate(TEXT, mix="anger:100", **SHORT).ids


def test_an_emotion_fades_over_the_turns_of_a_conversation(steered: SteeredModel) -> None:
    found = steered.generate([CHAT, CHAT[:1]], "anger", intensity=80, fade=1, **SHORT)
    assert found[0].ids == by_hand(steered, CHAT, {"anger": TOP * 0.4}) and found[1].ids == by_hand(steered, CHAT[:1], {"anger": TOP * 0.8})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(mix="angr:40"), UsageError, r"unknown emotion 'angr' \(did you mean 'anger'"),
        (dict(mix="anger:40", emotion="fear"), UsageError, "leave the emotion"),
        (dict(mix="anger:40", strength=1.0), UsageError, "not by strengths"),
        (dict(mix="anger:40", method="residual"), UsageError, "belong to the method 'circuit'"),
        (dict(arc="anger:40 -> fear:20", positions="all"), UsageError, "cannot act at all positions"),
        (dict(fade=2.0, emotion="anger"), UsageError, "name both"),
        (dict(emotion="anger", intensity=-101), UsageError, "between -100 and 100"),
        (dict(mixx="anger:40"), UsageError, "did you mean 'mix'"),
    ],
)
def test_what_makes_no_sense_is_refused(steered: SteeredModel, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        steered.generate(TEXT, **{**SHORT, **options})


def test_as_many_emotions_as_prompts_are_wanted_where_they_fade_as_well(steered: SteeredModel) -> None:
    with pytest.raises(UsageError, match="expected one emotion, or one for each of 3 prompts, found 2"):
        steered.generate([TEXT] * 3, ["fear", "anger"], intensity=50, fade=2, **SHORT)


def test_without_a_dial_there_are_no_mixtures(steered: SteeredModel) -> None:
    from dataclasses import replace

    assert steered.circuit is not None
    with pytest.raises(ArtifactError, match="not calibrated"):
        SteeredModel(steered.model, replace(steered.circuit, metrics={})).generate(TEXT, mix="anger:40")


def test_the_command_writes_what_the_api_writes(steered: SteeredModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert steered.circuit is not None
    steered.model.hf.save_pretrained(tmp_path / "tiny")
    steered.model.tokenizer.save_pretrained(tmp_path / "tiny")
    from dataclasses import replace

    from emosteer.models.model import Model

    loaded = Model.load(str(tmp_path / "tiny"))
    circuit = replace(steered.circuit, provenance=replace(steered.circuit.provenance, model_sha256=loaded.sha256))
    circuit.save(tmp_path / "circuit.safetensors")
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"messages": CHAT}) + "\n")
    usual = ["--model", str(tmp_path / "tiny"), "--circuit", str(tmp_path / "circuit.safetensors"), "--max-new-tokens", "10", "--json"]

    def command(*arguments: str) -> list[dict[str, Any]]:
        with pytest.raises(SystemExit) as end:
            cli.main(["generate", *arguments, *usual])
        shown = capsys.readouterr()
        assert end.value.code == 0, shown.err
        return [json.loads(line) for line in shown.out.splitlines()]

    [row] = command(TEXT, "--mix", "anger:50 + fear:-20")
    assert row["text"] == steered.generate(TEXT, mix={"anger": 50, "fear": -20}, **SHORT).text
    assert row["emotion"] == "anger:50 + fear:-20" and row["strength"] is None and row["id"] == "text/anger:50 + fear:-20"
    [row] = command(TEXT, "--arc", "anger:100 -> fear:50", "--arc-tokens", "5")
    assert row["text"] == steered.generate(TEXT, arc="anger:100 -> fear:50", arc_tokens=5, **SHORT).text
    rows = command("--input", str(source), "-e", "anger,fear", "--intensity", "80", "--fade", "1")
    assert [row["emotion"] for row in rows] == ["anger:40", "fear:40"]
    assert rows[0]["text"] == steered.generate(CHAT, mix="anger:40", **SHORT).text
    [row] = command(TEXT, "-e", "anger", "--intensity", "-50")
    assert row["text"] == steered.generate(TEXT, "anger", intensity=-50, **SHORT).text
    for wrong, message in (
        (("--mix", "anger:40", "--method", "prompt"), "have no meaning with --method prompt"),
        (("--mix", "anger:40", "--strength", "1"), "leave --strength out"),
        (("--mix", "anger:40", "-e", "fear"), "leave the emotion"),
        (("--mix", "anger:40", "--engine", "vllm"), "vLLM writes one emotion"),
        (("-e", "fear", "--intensity", "-101"), "between -100 and 100"),
    ):
        with pytest.raises(SystemExit) as end:
            cli.main(["generate", TEXT, *wrong, *usual])
        assert end.value.code == 2 and message in capsys.readouterr().err
