"""The benchmark's own parts: who is timed when, how rows are kept, and that what it compares gives the same numbers (tiny models)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bench.__main__ import FAMILIES, main, wants
from bench.attribution import ablated, clean, compare, one_pass
from bench.extraction import difference, flops_per_token, plain_forward, runner
from bench.huggingface import generate_theirs, left_padded
from bench.results import Bar, Results, Row, markdown, show
from bench.rivals import RIVALS, Driver
from bench.timing import Ratio, interleaved, median, ratio
from bench.workload import endless
from emosteer.base.errors import EmosteerError
from emosteer.directions import extract as extraction
from emosteer.directions.activations import Sample, batches_by_cost, read_states, tokenize_group
from emosteer.directions.settings import Settings
from emosteer.generation.decoding import Decoding
from emosteer.generation.generate import Request, generate
from emosteer.models.model import Model
from emosteer.models.sites import KINDS, RESID_MID, RESID_POST, Head, Neuron, Site, Unit
from emosteer.scenarios.scenarios import EMOTIONS
from tests.conftest import build, small_data
from tests.helpers import reference
from tests.helpers.precision import assert_forward

PROMPTS = ((1, 7, 9, 12, 30, 41), (1, 50, 33, 21, 17, 60, 44, 13, 3))


# ---- timing ------------------------------------------------------------------------------------------------------------


class Clock:
    """Time that passes only when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_every_round_times_every_contender_once_and_starts_with_another() -> None:
    clock, order = Clock(), []

    def work(name: str, seconds: list[float]) -> None:
        order.append(name)
        clock.now += seconds[order.count(name) - 1]

    spent = {"a": [90.0, 1.0, 2.0, 3.0], "b": [70.0, 4.0, 4.0, 9.0], "c": [50.0, 1.0, 1.0, 1.0]}  # the first is the warm-up
    found = interleaved({name: lambda name=name: work(name, spent[name]) for name in spent}, 3, warmup=1, clock=clock)  # type: ignore[misc]
    assert found == {"a": (1.0, 2.0, 3.0), "b": (4.0, 4.0, 9.0), "c": (1.0, 1.0, 1.0)}
    assert order == ["c", "a", "b", "a", "b", "c", "b", "c", "a", "c", "a", "b"]
    assert interleaved({"a": lambda: None}, 2, warmup=0, clock=clock) == {"a": (0.0, 0.0)}


def test_a_ratio_is_the_median_of_the_rounds_and_not_the_ratio_of_the_medians() -> None:
    slow, fast = (10.0, 40.0, 30.0), (1.0, 8.0, 2.0)  # quotients 10, 5, 15; medians 30 / 2 = 15
    found = ratio(slow, fast)
    assert found == Ratio(10.0, 5.0, 15.0) and str(found) == "5 to 15"
    assert ratio(slow, fast, factor=2) == Ratio(20.0, 10.0, 30.0) and median((3.0, 1.0, 2.0)) == 2.0


# ---- rows ----------------------------------------------------------------------------------------------------------------


def test_bars_judge_as_they_read() -> None:
    least, most = Bar(0.97), Bar(0.35, "s", at_least=False)
    assert str(least) == "at least 0.97 x" and str(most) == "at most 0.35 s" and str(Bar(1e-4, "", False)) == "at most 0.0001"
    assert least.met(0.97) and not least.met(0.9699) and most.met(0.35) and not most.met(0.3501)
    assert not least.met(float("nan")) and not most.met(float("nan"))
    row = Row.of("a.b", "w", 0.2, most)
    assert (row.met, row.unit, row.verdict, row.figure, row.family) == (True, "s", "met", "0.200 s", "a")
    assert Row.of("a.b", "w", None, most).verdict == "not met" and Row.of("a.b", "w", None, most).figure == "not measured"
    assert Row.of("a.b", "w", 3.0).verdict == "" and Row.of("a.b", "w", 0.0, unit="").figure == "0.000"
    assert [Row.of("a", "w", value).figure for value in (4.2e-5, 0.953, 166.66, 54321.0)] == ["4.2e-05 x", "0.953 x", "167 x", "54,321 x"]


def signed(id: str, value: float | None, machine: str = "m1") -> Row:
    return replace(Row.of(id, f"what {id}", value, Bar(2), note="a | b"), machine=machine, command=f"run {id}", date="2026-01-01")


def test_rows_are_kept_one_by_one_and_replaced_alone(tmp_path: Path) -> None:
    results = Results(tmp_path, ["one", "two"])
    for row in (signed("two.a", 1.0), signed("one.a", 3.0), signed("one.b", 4.0)):
        results.put(row, {"cpu": "x"})
        assert row in Results(tmp_path, ["one", "two"]).rows.values()  # on disk at once
    again = Results(tmp_path, ["one", "two"])
    again.put(signed("one.a", 5.0, "m2"), {"cpu": "y"})
    assert [(row.id, row.value, row.machine) for row in again.ordered()] == [
        ("one.a", 5.0, "m2"),
        ("one.b", 4.0, "m1"),
        ("two.a", 1.0, "m1"),
    ]
    again.drop_stale("one", ["one.a"])
    assert [row.id for row in Results(tmp_path, ["one", "two"]).ordered()] == ["one.a", "two.a"]
    again.drop_stale("two", [])
    assert set(json.loads((tmp_path / "results.json").read_text())["machines"]) == {"m2"}  # machines without a row are gone
    assert not list(tmp_path.glob(".*"))  # nothing half-written lies about


def test_the_page_has_a_line_per_row_and_counts_the_bars(tmp_path: Path) -> None:
    rows = [signed("one.a", 3.0), signed("one.b", 1.0), Row.of("two.c", "no bar", 1.0)]
    page = markdown(rows, {"m1": {"cpu": "x", "cores": 2}})
    assert "1 of 2 bars met." in page and "Machine m1: cpu x, cores 2." in page
    table = [line for line in page.splitlines() if line.startswith("| ")]
    assert len(table) == 4 and all(line.replace("\\|", "").count("|") == 8 for line in table)
    assert table[1] == "| what one.a | **3.000 x** |  | at least 2 x | met | a \\| b; machine m1, 2026-01-01 | `run one.a` |"
    console = Console(file=(tmp_path / "out").open("w"), width=60)
    show(rows, console)
    console.file.close()
    text = (tmp_path / "out").read_text()
    assert "one.b" in text and "not met" in text and "a | b" in text


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": [{"what": "x"}], "machines": {}}', '{"rows": [1], "machines": {}}'])
def test_a_damaged_file_of_results_is_one_line(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results.json").write_text(text)
    assert main(["--show", "--out", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("bench: ") and captured.err.count("\n") == 1 and "results.json" in captured.err


def test_rows_are_chosen_by_family_or_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert wants([], "a.b") and wants(["a"], "a.b") and wants(["a.b"], "a.b") and wants(["a.b"], "a.b.c")
    assert not wants(["a.b"], "a.bc") and not wants(["a.b"], "a.c")
    assert main(["--only", "atribution", "--out", str(tmp_path)]) == 2
    assert "did you mean" in capsys.readouterr().err and not list(tmp_path.iterdir())
    assert {"attribution", "extract", "steering", "huggingface", "rivals", "startup", "memory"} == set(FAMILIES)


# ---- what is compared is equal -------------------------------------------------------------------------------------------


def directions(model: Model, seed: int) -> torch.Tensor:
    vectors = torch.randn(2, model.shape.n_layers, model.shape.d_model, generator=torch.Generator().manual_seed(seed))
    return vectors / vectors.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_the_attribution_that_is_timed_equals_the_loop(name: str) -> None:
    model = build(name)
    v_mid, v_post = directions(model, 1), directions(model, 2)
    ticks: list[int] = []
    found = compare(model, PROMPTS, v_mid, v_post, neurons=24, tick=lambda: ticks.append(1))
    shape = model.shape
    assert found.loop_passes == len(PROMPTS) * shape.n_layers * shape.n_heads
    assert len(found.one_pass_seconds) == len(ticks) == shape.n_layers and found.loop_seconds > 0
    assert found.head_error <= 1e-4 and found.neuron_error <= 1e-4
    heads, neurons = one_pass(model, PROMPTS, v_mid, v_post)
    assert heads.shape == (2, 2, shape.n_layers, shape.n_heads) and neurons.shape == (2, 2, shape.n_layers, shape.d_mlp)


@torch.no_grad()
def test_the_loop_ablates_what_it_says(tiny: Model) -> None:
    """Against bare hooks on the plain model."""
    prompt = PROMPTS[1]
    cases: list[tuple[Unit, str, str, slice]] = [
        (Head(1, 2), "z", RESID_MID, slice(2 * tiny.shape.d_head, 3 * tiny.shape.d_head)),
        (Neuron(2, 5), "mlp_post", RESID_POST, slice(5, 6)),
    ]
    for unit, kind, behind, where in cases:

        def zero(x: torch.Tensor, where: slice = where) -> torch.Tensor:
            x = x.clone()
            x[..., where] = 0
            return x

        expected = reference.seen(tiny.hf, prompt, [(unit.layer, behind)], {(unit.layer, kind): zero})[unit.layer, behind][-1]
        torch.testing.assert_close(ablated(tiny, prompt, unit), expected)
        assert not torch.allclose(clean(tiny, prompt)[Site(unit.layer, behind)], expected)


def test_the_extraction_that_is_timed_equals_the_simple_one(family: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups, bank = small_data(6)
    simple = runner(family, groups, bank, Settings(EMOTIONS, packed=False, batch_tokens=1), tmp_path)()
    ways = (Settings(EMOTIONS), Settings(EMOTIONS, packed=False), Settings(EMOTIONS, batch_tokens=100))
    passes: dict[tuple[object, ...], object] = {}
    for settings in ways:
        sizes: list[object] = []
        with monkeypatch.context() as patch:
            patch.setattr(
                extraction, "read_states", lambda *a, sizes=sizes, **o: (sizes.append((len(a[1]), o["packed"])), read_states(*a, **o))[1]
            )
            found = runner(family, groups, bank, settings, tmp_path)()
        passes[tuple(sizes)] = settings
        # states differ by up to 1.4e-5 (forward_bound), contrasts are down to a twentieth of them, and 18 groups' mean is off by a
        # quarter of what one is: 7e-5. It is the bar of `make bench`, too
        assert difference(found, simple) <= 1e-4
    assert len(passes) == len(ways) and all(len(sizes) < len(groups) for sizes in passes), "each computes in batches of its own"
    other = {key: {e: replies[EMOTIONS[0]] + (" door" * i) for i, e in enumerate(EMOTIONS)} for key, replies in bank.items()}
    assert difference(runner(family, groups, other, Settings(EMOTIONS), tmp_path)(), simple) > 1e-2
    assert not list(tmp_path.iterdir())  # no checkpoint is left


def test_states_are_the_same_on_both_trees(family: Model) -> None:
    groups, bank = small_data(2)
    samples = [tokenize_group(family, group, "reply", EMOTIONS, bank[group.key], "") for group in groups]
    sites = [Site(layer, kind) for layer in range(family.shape.n_layers) for kind in KINDS]
    for packed in (True, False):
        plain = read_states(family, samples, sites, packed=packed)
        bridge = read_states(family, samples, sites, packed=packed, bridge=True)
        for site in sites:
            assert_forward(plain[site], bridge[site], str(site))


def test_states_do_not_depend_on_how_much_prompt_is_left_out(tiny: Model) -> None:
    """A batch averages from the first position that any row reads: a short prompt beside a long one must not move the long one's."""
    short, long = (Sample(None, "", ((*range(5, 5 + n),),) * 2, ((9, 8, 7), (6,))) for n in (2, 12))  # type: ignore[arg-type]
    site = Site(1, RESID_POST)
    both = read_states(tiny, [long, short], [site])[site]
    for index, sample in enumerate((long, short)):
        assert_forward(both[index], read_states(tiny, [sample], [site])[site][0])


def test_unpacked_batches_count_the_prompt_once_per_emotion(tiny: Model) -> None:
    groups, bank = small_data(4)
    samples = [tokenize_group(tiny, group, "reply", EMOTIONS, bank[group.key], "") for group in groups]
    assert all(s.cost_alone - s.cost == 5 * len(s.prompts[0]) for s in samples)
    budget = 2 * max(s.cost_alone for s in samples)
    batches = batches_by_cost(samples, budget, packed=False)
    assert all(len(batch) * max(s.cost_alone for s in batch) <= budget for batch in batches) and max(map(len, batches)) > 1
    assert len(batches_by_cost(samples, budget)) < len(batches)


def test_the_plain_pass_computes_every_text_once(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    groups, bank = small_data(3)
    samples = [tokenize_group(tiny, group, "reply", EMOTIONS, bank[group.key], "") for group in groups]
    seen: list[tuple[int, ...]] = []

    def keep(module: torch.nn.Module, args: tuple[object, ...], kwargs: dict[str, torch.Tensor]) -> None:
        for row, mask in zip(kwargs["input_ids"], kwargs["attention_mask"], strict=True):
            seen.append(tuple(row[mask.bool()].tolist()))

    handle = tiny.body.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        plain_forward(tiny, samples, 64)
    finally:
        handle.remove()
    assert sorted(seen) == sorted(p + r for s in samples for p, r in zip(s.prompts, s.replies, strict=True))
    layer = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48)
    assert flops_per_token(tiny) == 3 * layer


# ---- generation ----------------------------------------------------------------------------------------------------------


def test_contenders_write_the_same_full_replies(tiny: Model) -> None:
    requests = [Request(str(i), prompt) for i, prompt in enumerate(PROMPTS)]
    hf = build("llama").hf
    hf.generation_config.eos_token_id = None
    before = tiny.stop_ids
    with endless(tiny):
        ours = generate(tiny, requests, None, Decoding(max_new_tokens=24))
        theirs = generate_theirs(hf, left_padded(requests, 0), 24, 0)
    assert tiny.stop_ids == before and all(reply.n_tokens == 24 for reply in ours)
    assert [list(reply.ids) for reply in ours] == theirs.tolist()


def test_a_driver_that_dies_is_a_reason_and_not_a_traceback(tmp_path: Path) -> None:
    import sys

    script, task = tmp_path / "driver.py", tmp_path / "task.json"
    script.write_text("import sys\nprint('{\"ready\": true}', flush=True)\nsys.stdin.readline()\nraise ValueError('no such layer')\n")
    with Driver(Path(sys.executable), script, task) as driver:
        assert driver.ready == {"ready": True}
        with pytest.raises(EmosteerError, match="no such layer"):
            driver.go()
    script.write_text("import nothing_of_that_name\n")
    with pytest.raises(EmosteerError, match="nothing_of_that_name"):
        Driver(Path(sys.executable), script, task)
    assert all(rival.driver.exists() for rival in RIVALS)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available() or not Path("/proc/self/status").exists(), reason="oneDNN on Linux")
def test_kernels_for_ever_new_shapes_are_not_all_kept() -> None:
    """In bfloat16 every new number of rows compiles kernels of its own; extraction meets a hundred numbers."""
    program = (
        "import sys, torch\nfrom emosteer.models.memory import bound_kernel_caches, release_memory\n"
        "if sys.argv[1] == 'bound': bound_kernel_caches()\n"
        "def held():\n    release_memory()\n"
        "    return next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('RssAnon'))\n"
        "layers = [torch.nn.Linear(256, size).to(torch.bfloat16) for size in (192, 256, 320, 384)]\n"
        "def run(counts):\n    for rows in counts:\n        for layer in layers: layer(torch.ones(rows, 256, dtype=torch.bfloat16))\n"
        "with torch.no_grad():\n    run(range(100, 120)); before = held(); run(range(120, 220))\nprint(held() - before)"
    )

    env = {name: value for name, value in os.environ.items() if not name.endswith("CACHE_CAPACITY")}

    def growth(how: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", program, how], capture_output=True, text=True, cwd=Path(__file__).parent.parent, env=env, check=True
        )
        return int(done.stdout)

    free = growth("free")
    if free < 20_000:
        pytest.skip("this build keeps nothing per shape")
    assert growth("bound") < free / 2


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel's peak is read from /proc")
def test_the_peak_of_loading_does_not_hide_that_of_the_work() -> None:
    code = (
        "from bench.drivers.peak import loaded, peak_bytes\n"
        "x = bytearray(200 << 20); del x\nbefore = loaded()\ny = bytearray(60 << 20)\ndel y\nprint(before >> 20, peak_bytes() >> 20)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1], timeout=60)
    loading, working = map(int, done.stdout.split())
    assert loading >= 200 and 60 <= working < 150, done.stderr
