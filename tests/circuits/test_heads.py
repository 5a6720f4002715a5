"""What heads do, against other ways of finding it out: attention written out by hand, paths cut for real, logits moved for real."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from emosteer.attribution.unit_scores import head_contributions
from emosteer.base import artifacts
from emosteer.base.errors import ArtifactError, DataError, ModelError, UsageError
from emosteer.circuits.circuit import Circuit
from emosteer.circuits.heads.checks import Pair, check_text, text_row_of, written_by
from emosteer.circuits.heads.graph import graph
from emosteer.circuits.heads.heads import HeadStudy, overview
from emosteer.circuits.heads.paths import edges_into, followed, targets_of
from emosteer.circuits.heads.reading import CLASSES, INSTRUCTION, ITSELF, PROMPT, REPLY, START, class_shares, rows_and_places, token_classes
from emosteer.circuits.heads.settings import HeadSettings
from emosteer.circuits.heads.study import added_lengths, ranked, study, told_apart
from emosteer.circuits.heads.writing import logit_changes
from emosteer.circuits.places import Places
from emosteer.cli import main as cli
from emosteer.directions.activations import make_batch, tokenize_group
from emosteer.directions.directions import Directions
from emosteer.directions.extract import extract
from emosteer.directions.settings import Settings
from emosteer.models.attention import frozen_scale, see, value_weights
from emosteer.models.model import Model
from emosteer.models.sites import ATTN_OUT, RESID_MID, RESID_POST, Head, Site, Z
from emosteer.scenarios.scenarios import Bank, Group
from emosteer.scenarios.shipped import read_data
from tests.conftest import build, small_data, tiny_tokenizer
from tests.helpers.families import MODELS
from tests.helpers.tiny_project import write_tiny_project

EMOTIONS = ("anger", "fear", "sadness")
SETTINGS = HeadSettings(described=3, nodes=8, edges=12, groups=8, texts=2, tokens=5, checked=12, random=4)


def directions_of(model: Model, groups: list[Group], bank: Bank) -> Directions:
    return extract(model, groups, Settings(EMOTIONS, instruction="keep to two sentences ."), bank=bank)


def circuit_of(model: Model, made: Directions) -> Circuit:
    """Three heads in four of every layer, with outputs of their own."""
    shape, n = model.shape, len(EMOTIONS)
    heads = torch.ones(n, shape.n_layers, shape.n_heads, dtype=torch.bool)
    heads[:, :, 3] = False
    z = torch.randn(n, shape.n_layers, shape.n_heads, shape.d_head, generator=torch.Generator().manual_seed(3)) * heads[..., None]
    return Circuit(
        emotions=EMOTIONS,
        heads=heads,
        z_delta=z.flatten(-2),
        neuron_index=torch.zeros(0, 3, dtype=torch.long),
        neuron_delta=torch.zeros(0),
        strength=torch.ones(n),
        importance=torch.zeros(n, shape.n_layers, 2),
        vectors=made.at(RESID_POST),
        rms=torch.ones(shape.n_layers),
        residual_layers=(1,),
        residual_strength=1.0,
        d_mlp=shape.d_mlp,
        preset="auto",
        instruction=made.instruction,
        metrics={},
        provenance=made.provenance,
    )


@pytest.fixture(scope="module")
def data() -> tuple[list[Group], Bank]:
    return small_data(scenarios=4, emotions=(*EMOTIONS, "neutral"))


@pytest.fixture(scope="module")
def made(tiny: Model, data: tuple[list[Group], Bank]) -> tuple[Circuit, Directions]:
    found = directions_of(tiny, *data)
    return circuit_of(tiny, found), found


@pytest.fixture(scope="module")
def whole(tiny: Model, data: tuple[list[Group], Bank], made: tuple[Circuit, Directions]) -> HeadStudy:
    return study(tiny, *made, *data, SETTINGS, parents={"circuit": "c" * 64})


# ---- edges: the direct path through values -------------------------------------------------------------------------------


def one_text(model: Model, seed: int = 1) -> tuple[Any, Any]:
    """A batch of one random text of 14 tokens, 9 of them the prompt, and everything that happens in it."""
    ids = torch.randint(6, model.shape.d_vocab, (14,), generator=torch.Generator().manual_seed(seed)).tolist()
    batch = make_batch(model, [text_row_of(ids, 9)])
    sites = [Site(layer, kind) for layer in range(model.shape.n_layers) for kind in (Z, ATTN_OUT)]
    return batch, see(model, batch.ids, batch.mask, batch.positions, sites)


def random_directions(model: Model, made: Directions) -> Directions:
    """The same artefact with directions of the model's own size, whatever it was made from."""
    sites = tuple(Site(layer, kind) for layer in range(model.shape.n_layers) for kind in (RESID_MID, RESID_POST))
    vectors = torch.randn(len(EMOTIONS), len(sites), model.shape.d_model, generator=torch.Generator().manual_seed(5))
    return replace(made, sites=sites, vectors=vectors / vectors.norm(dim=-1, keepdim=True))


def test_an_edge_is_what_cutting_the_path_takes_away_with_pattern_and_scale_held(family: Model, made: tuple[Circuit, Directions]) -> None:
    """The path is cut by hand: values are made from the stream without what A wrote, divided by the norm's scale of the whole stream, and
    weighed by the pattern of the whole stream. No gradient, no linearity is used."""
    directions = random_directions(family, made[1])
    batch, seen = one_text(family)
    n_layers, n_heads, d_head = family.shape.n_layers, family.shape.n_heads, family.shape.d_head
    last = n_layers - 1
    targets = targets_of(family, directions, [Head(last, h) for h in range(n_heads)], seen)
    edges = edges_into(family, targets, followed(family, seen, batch, targets).z)[0]
    block, v_mid = family.layers[last], directions.at(RESID_MID)

    def contribution(stream: Tensor) -> Tensor:
        """[emotion, head] of the last layer, its norm's scale and its patterns held."""
        norm = block.input_layernorm
        scale = frozen_scale(family, "input_layernorm", last, seen.stream[last])
        gain = norm.weight + 1 if family.family.norm_offset else norm.weight
        values = block.self_attn.v_proj(stream * scale[..., None] * gain)[0].unflatten(-1, (-1, d_head))
        values = values.repeat_interleave(n_heads // family.shape.n_kv_heads, 1)
        z = torch.einsum("hqk,khd->qhd", seen.patterns[last][0], values)[8:13].mean(0)
        whole = torch.zeros(n_layers, n_heads * d_head)
        whole[last] = z.flatten()
        return head_contributions(family, whole[None], v_mid)[:, last]

    before = contribution(seen.stream[last])
    for layer in range(last):
        for head in range(n_heads):
            cut = contribution(seen.stream[last] - written_by(family, seen.values, Head(layer, head)))
            torch.testing.assert_close(edges[:, :, layer, head].T, before - cut, atol=2e-5, rtol=1e-3)
    assert edges[:, :, :last].abs().max() > 1e-3 and not edges[:, :, last].any(), "no edge inside a layer"


@pytest.mark.parametrize("name", ["llama", "phi3", "glm4", "granite", "gemma2", "olmo2", "cohere", "gpt-neox, in turn", "gpt2"])
def test_all_that_arrives_adds_up_to_the_contribution(name: str, made: tuple[Circuit, Directions]) -> None:
    """For one matrix of queries, keys and values in each of its orders, norms before, behind and none, parallel blocks, factors. Two texts
    are compared: what a bias of the values adds is the same in both, and in no stream."""
    torch.manual_seed(0)
    model = Model.from_hf(MODELS[name].make(), tiny_tokenizer(), name)
    directions, layer = random_directions(model, made[1]), model.shape.n_layers - 1
    heads = [Head(layer, h) for h in range(model.shape.n_heads)]
    parts, wanted, into = [], [], []
    for seed in (2, 4):
        batch, seen = one_text(model, seed)
        targets = targets_of(model, directions, heads, seen)
        arrived = followed(model, seen, batch, targets)
        parts.append(torch.einsum("ktsm,tem->kets", arrived.stream, targets.reads)[0])
        z = torch.stack([batch.average(seen.values[Site(n, Z)]) for n in range(layer + 1)], 1)
        wanted.append(head_contributions(model, z, directions.at(RESID_MID))[:, layer])
        into.append(edges_into(model, targets, arrived.z)[0].sum((-1, -2)).T)
    torch.testing.assert_close((parts[0] - parts[1]).sum(-1), wanted[0] - wanted[1], atol=1e-4, rtol=1e-3)
    # what a bias of W_O adds counts with the MLPs
    torch.testing.assert_close(into[0] - into[1], parts[0][..., 1] - parts[1][..., 1], atol=1e-4, rtol=1e-3)
    assert (wanted[0] - wanted[1]).abs().max() > 1e-3


def test_a_real_patch_agrees_where_nothing_but_values_depends_on_the_stream(tiny: Model, made: tuple[Circuit, Directions]) -> None:
    """Queries and keys switched off: patterns cannot change, and what is left between edge and patch is the norm's scale. With them on, the
    patch differs; so it does patch, and it patches one path: the stream after the layer is as it was but for that head's layer."""
    batch, seen = one_text(tiny, 3)
    ids = batch.ids[0].tolist()
    heads = [Head(2, h) for h in range(4)]
    pairs = [Pair(Head(a, h), Head(2, 3 - h), h % 3) for a in (0, 1) for h in range(4)]

    def compared(model: Model) -> tuple[Tensor, Tensor]:
        _, seen = one_text(model, 3)
        return check_text(model, made[1], text_row_of(ids, 9), pairs, targets_of(model, made[1], heads, seen))

    on = compared(tiny)
    off = build("llama")
    for layer in off.layers:
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            linear.weight.zero_()
        layer.input_layernorm.variance_epsilon = 1e6  # a norm whose scale does not depend on the stream
        layer.self_attn.v_proj.weight.mul_(1e3)
    estimate, truth = compared(off)
    torch.testing.assert_close(truth, estimate, atol=1e-4, rtol=1e-3)
    assert (on[0] - on[1]).abs().max() > 0.01 * on[0].abs().max()


def test_values_are_found_or_refused(tiny: Model) -> None:
    batch, seen = one_text(tiny)
    weight = tiny.layers[1].self_attn.v_proj.weight.unflatten(0, (2, 8)).repeat_interleave(2, 0)
    assert torch.equal(value_weights(tiny, 1, seen), weight)
    seen.values[Site(1, Z)].mul_(1.1)
    with pytest.raises(ModelError, match="not their values weighed"):
        value_weights(tiny, 1, seen)


# ---- where heads look ------------------------------------------------------------------------------------------------------


def test_packed_replies_are_read_as_they_are_alone(tiny: Model, data: tuple[list[Group], Bank]) -> None:
    group, replies = data[0][0], data[1][data[0][0].key]
    sample = tokenize_group(tiny, group, "reply", EMOTIONS, replies, "keep to two sentences .")
    rows, places = rows_and_places(tiny, sample)
    packed = make_batch(tiny, rows)
    seen = see(tiny, packed.ids, packed.mask, packed.positions)
    assert len(rows) == 1
    for label, (row, where) in enumerate(places):
        ids = sample.prompts[label] + sample.replies[label]
        alone = make_batch(tiny, [text_row_of(ids, len(sample.prompts[label]))])
        own = see(tiny, alone.ids, alone.mask, alone.positions)
        for layer in range(tiny.shape.n_layers):
            torch.testing.assert_close(
                seen.patterns[layer][row][:, list(where)][:, :, list(where)], own.patterns[layer][0], atol=1e-5, rtol=1e-4
            )
    assert tiny.hf.config._attn_implementation != "eager", "the model is as it was"


def test_tokens_are_classed_by_what_wrote_them(tiny: Model, data: tuple[list[Group], Bank]) -> None:
    group, instruction = data[0][0], "keep to two sentences ."
    sample = tokenize_group(tiny, group, "reply", EMOTIONS, data[1][group.key], instruction)
    classes = token_classes(tiny, group, instruction, sample, 1)
    words = tiny.tokenizer.convert_ids_to_tokens(list(sample.prompts[1] + sample.replies[1]))
    said = {kind: " ".join(w for w, c in zip(words, classes, strict=True) if c == kind) for kind in range(len(CLASSES))}
    assert said[START] == "<|im_start|>" and said[PROMPT] == group.text and said[INSTRUCTION] == instruction
    assert said[REPLY] == data[1][group.key]["fear"] and classes.count(REPLY) == len(sample.replies[1])


def test_class_shares_by_hand() -> None:
    pattern = torch.tensor([[[0.5, 0.2, 0.3, 0.0], [0.1, 0.2, 0.3, 0.4]]])
    shares = class_shares(pattern, (START, PROMPT, PROMPT, REPLY), [2, 3])
    assert shares.shape == (1, 2, len(CLASSES)) and torch.allclose(shares.sum(-1), torch.ones(1, 2))
    torch.testing.assert_close(shares[0, 0, [START, PROMPT, ITSELF]], torch.tensor([0.5, 0.2, 0.3]))
    torch.testing.assert_close(shares[0, 1, [START, PROMPT, REPLY, ITSELF]], torch.tensor([0.1, 0.5, 0.0, 0.4]))


# ---- what heads write --------------------------------------------------------------------------------------------------------


def test_logit_changes_are_what_a_small_push_does_to_the_logits(family: Model) -> None:
    """Along directions that keep the norm's scale, the only thing left out."""
    with torch.no_grad():
        state = torch.randn(1, family.shape.d_model, generator=torch.Generator().manual_seed(0))
        push = torch.randn(1, family.shape.d_model, generator=torch.Generator().manual_seed(1))
        push -= state * (push @ state.T) / (state @ state.T)
        moved, base = (family.logits(family.final_norm(state + step * push)) for step in (1e-3, -1e-3))
        change = (moved - base)[0].double()
    change = (change - change.mean()) / change.std()
    torch.testing.assert_close(logit_changes(family, push)[0].double(), change, atol=5e-3, rtol=1e-2)


# ---- the whole ---------------------------------------------------------------------------------------------------------------


def test_pages_are_of_the_heads_that_add_most_and_say_what_was_read(
    whole: HeadStudy, tiny: Model, made: tuple[Circuit, Directions]
) -> None:
    circuit = made[0]
    for e, emotion in enumerate(EMOTIONS):
        written = {
            Head(layer, h): (circuit.z_delta[e, layer].unflatten(0, (4, 8))[h] @ tiny.w_o(layer)[h]).norm().item()
            for layer in range(3)
            for h in range(4)
            if circuit.heads[e, layer, h]
        }
        wanted = sorted(written, key=lambda head: -written[head])[: SETTINGS.described]
        assert [Head(p["layer"], p["head"]) for p in whole.of(emotion)] == wanted and ranked(added_lengths(tiny, circuit)[e])[:3] == wanted
        assert whole.of(emotion)[0]["length"] == pytest.approx(written[wanted[0]], rel=1e-4)
    assert whole.labels == (*EMOTIONS, "neutral") and whole.n_groups == 8
    for table in (whole.attention, whole.at_start):
        torch.testing.assert_close(table.sum(-1), torch.ones(table.shape[:-1]))
    assert whole.even.sum().item() == pytest.approx(1, abs=1e-5) and not whole.even_at_start[REPLY]
    page = whole.pages[0]
    assert len(page["fires"]["most"]) == 2 and page["fires"]["most"][0][1] >= page["fires"]["most"][1][1] > page["fires"]["least"][0][1]
    number, score, course = page["fires"]["most"][0]
    assert len(course) == len(whole.texts[number]["tokens"])
    assert score == pytest.approx(sum(course) / len(course) * page["fires"]["peak"], abs=0.006 * page["fires"]["peak"])
    assert [row["heads"] for row in overview(whole)] == [3, 3, 3]


def test_the_contrast_of_a_head_is_the_directions_own(
    whole: HeadStudy, data: tuple[list[Group], Bank], tiny: Model, made: tuple[Circuit, Directions]
) -> None:
    """Read over all prompts, what is told here of attention's heads is what `extract` kept of them."""
    every = study(tiny, *made, *data, replace(SETTINGS, groups=12, nodes=0))
    own = head_contributions(tiny, made[1].z.mean, made[1].at(RESID_MID))
    torch.testing.assert_close(every.contrast, own, atol=1e-5, rtol=1e-3)
    assert not len(every.edge_weight) and every.pages[0]["sources"] is None and every.notes == ("no graph was asked for",)


def test_sources_add_up_to_the_contrast_and_kept_edges_are_above_the_floor(whole: HeadStudy) -> None:
    for page in whole.pages:
        if page["layer"] and page["sources"]:
            assert sum(page["sources"].values()) == pytest.approx(page["contribution"], abs=1e-3)
    for (e, a, _, b, _), weight in zip(whole.edge_index.tolist(), whole.edge_weight.tolist(), strict=True):
        assert a < b and abs(weight) > whole.edge_floor[EMOTIONS[e]]
    assert all(count <= 12 for count in whole.edge_index[:, 0].bincount().tolist()) and whole.checks["n"] == 12


def test_a_head_that_reads_the_emotion_is_told_from_one_that_does_not() -> None:
    scores = torch.zeros(2, 3, 2, 1, 2)  # group, label, emotion, layer, head
    scores[:, 0, 0, 0, 0] = 1.0
    told = told_apart(scores, 2)
    assert told[0, 0].tolist() == [1.0, 0.5] and told[1, 0].tolist() == [0.5, 0.5]


def test_the_same_seed_gives_the_same_bytes_and_a_file_is_read_back(
    whole: HeadStudy, data: Any, tiny: Model, made: Any, tmp_path: Path
) -> None:
    study(tiny, *made, *data, SETTINGS, parents={"circuit": "c" * 64}).save(tmp_path / "again")
    whole.save(tmp_path / "heads")
    assert (tmp_path / "heads").read_bytes() == (tmp_path / "again").read_bytes()
    found = HeadStudy.load(tmp_path / "heads")
    assert found.pages == whole.pages and torch.equal(found.edge_weight, whole.edge_weight)
    loaded = artifacts.load(tmp_path / "heads")
    loaded.fields["pages"][0]["layer"] = 7
    with pytest.raises(ArtifactError, match="pages.layer"):
        HeadStudy.from_artifact(loaded)


def test_the_graph_names_nodes_that_are_there(whole: HeadStudy) -> None:
    drawn = json.loads(json.dumps(graph(whole)))
    assert drawn["schema"] == "emosteer/heads-graph" and drawn["parents"] == {"circuit": "c" * 64}
    for emotion in EMOTIONS:
        nodes = {node["id"]: node for node in drawn["emotions"][emotion]["nodes"]}
        edges = drawn["emotions"][emotion]["edges"]
        assert {edge[end] for edge in edges for end in ("source", "target")} <= nodes.keys()
        assert {f"L{page['layer']}H{page['head']}" for page in whole.of(emotion)} <= nodes.keys()
        assert [edge["weight"] for edge in edges] == sorted((edge["weight"] for edge in edges), key=abs, reverse=True)
        for edge in edges:
            assert nodes[edge["source"]]["layer"] < nodes[edge["target"]]["layer"]


def test_what_cannot_be_described_is_refused(tiny: Model, made: tuple[Circuit, Directions], data: tuple[list[Group], Bank]) -> None:
    circuit, directions = made
    with pytest.raises(ArtifactError, match="expected directions of anger, fear, sadness"):
        study(tiny, circuit, replace(directions, emotions=EMOTIONS[::-1]), *data, SETTINGS)
    with pytest.raises(DataError, match="at least 2 prompts with a reply in each"):
        study(tiny, circuit, directions, data[0], {key: {"anger": row["anger"]} for key, row in data[1].items()}, SETTINGS)
    with pytest.raises(UsageError, match="--nodes to be 0 or at least"):
        HeadSettings(nodes=4)
    none = replace(circuit, heads=torch.zeros_like(circuit.heads), z_delta=torch.zeros_like(circuit.z_delta))
    with pytest.raises(ArtifactError, match="a circuit with heads, found none for anger"):
        study(tiny, none, directions, *data, SETTINGS)


def test_the_command_writes_artefact_and_graph_and_inspect_prints_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    model = Model.load("tiny")
    data = read_data(Path("sev.jsonl"), Path("bank.jsonl"))
    found = extract(model, data.groups, Settings(EMOTIONS, instruction=""), bank=data.bank)
    found.save(Path("directions"))
    circuit_of(model, found).save(Path("circuit"))

    def said(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            cli.main(list(arguments))
        assert not ended.value.code, capsys.readouterr().err
        return capsys.readouterr().out

    run = "heads --model tiny --circuit circuit --directions directions --scenarios sev.jsonl --replies bank.jsonl --groups 4 --checked 6"
    summary = json.loads(said(*run.split(), "--described", "2", "--nodes", "6", "--random", "2", "--json"))
    places = Places.of("tiny")
    assert summary["file"] == str(places.heads) and len(summary["heads"]) == 6 and summary["prompts"] == 4
    study = HeadStudy.load(places.heads)
    assert json.loads(places.heads_graph.read_text()) == json.loads(json.dumps(graph(study)))
    assert shlex.split(study.provenance.command or "")[:2] == ["emosteer", "heads"] and "--json" not in (study.provenance.command or "")
    shown = said("inspect", str(places.heads))
    assert "where the heads look while a reply is written" in shown and str(study.of("anger")[0]["layer"]) in shown


def test_looking_inside_leaves_no_hook_behind(tiny: Model) -> None:
    """Neither the first time nor the second, which sees the same; with a hook left there, replies would be written by the slow engine."""
    ids = torch.tensor([[3, 5, 7, 9]])
    once, again = (see(tiny, ids, torch.ones_like(ids), torch.arange(4)[None]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once.patterns + once.stream, again.patterns + again.stream, strict=True))
    assert not any(module._forward_hooks for module in tiny.hf.modules())
