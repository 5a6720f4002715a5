"""Steering that changes from token to token: against every sequence recomputed whole, on both forward passes, in batches whose rows end."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from emosteer.generation.decoding import Decoding
from emosteer.generation.engines import HookedEngine, LeanEngine, engine_for
from emosteer.generation.generate import Request, generate
from emosteer.generation.steering import Course, Injector, SteeringPlan, compile_units, plan_for
from emosteer.models.model import Model
from emosteer.models.sites import ATTN_OUT, MLP_OUT, RESID_POST, Site
from tests.generation.test_steering import PENALTY, PROMPTS, ROWS, circuit
from tests.helpers import reference
from tests.helpers.precision import forward_bound

STEPS = 12
#: Per row the weights of three emotions, token by token: from one to another, from nothing, unchanged, and back and forth.
PATHS = [
    [[2 - t / 4, 0, t / 4] for t in range(8)],
    [[0, t / 3, 0] for t in range(5)],
    [[0.5, 0.5, -1]],
    [[0, 0, 2 * (t % 2)] for t in range(STEPS)],
    [[0, 0, 0]],
]


def weights() -> Tensor:
    longest = max(map(len, PATHS))
    return torch.tensor([[*path, *[path[-1]] * (longest - len(path))] for path in PATHS])


def changes(z: Tensor, mlp: Tensor, path: Tensor) -> reference.Changes:
    """The modulation of one row at unit level: position t of the reply gets the sum that belongs to token t."""

    def shifted(delta: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: x + (path @ delta)[torch.arange(x.shape[1]).clamp_max(len(path) - 1)]

    layers = range(z.shape[1])
    return {(layer, kind): shifted(delta[:, layer]) for kind, delta in (("z", z), ("mlp_post", mlp)) for layer in layers}


@pytest.mark.parametrize("stopping", [False, True])
def test_each_token_is_written_under_its_own_sum(family: Model, monkeypatch: pytest.MonkeyPatch, stopping: bool) -> None:
    z, mlp = circuit(family)
    stops: frozenset[int] = frozenset()
    paths = weights()

    def expected() -> list[tuple[int, ...]]:
        each = zip(PROMPTS, paths, strict=True)
        return [reference.greedy(family, prompt, changes(z, mlp, path), STEPS, stops, PENALTY)[0] for prompt, path in each]

    if stopping:
        free = expected()
        stops = frozenset({free[0][3], free[3][6]})
    monkeypatch.setitem(family.__dict__, "stop_ids", stops)
    course = Course(compile_units(family, z, mlp), paths)
    requests = [Request(str(row), prompt) for row, prompt in enumerate(PROMPTS)]
    decoding = Decoding(STEPS, repetition_penalty=PENALTY)
    found = generate(family, requests, SteeringPlan.over(course), decoding)
    assert [reply.ids for reply in found] == expected()
    assert (len({reply.n_tokens for reply in found}) > 1) is stopping
    start = generate(family, requests, SteeringPlan(course.at(0), len(PROMPTS)), decoding)
    same = [a.ids == b.ids for a, b in zip(found, start, strict=True)]
    assert same[2] and same[4] and (stopping or not all(same)), "the arc matters, and rows without one stay"


def test_weights_that_stay_are_the_plan_of_these_strengths(tiny: Model) -> None:
    vectors = compile_units(tiny, *circuit(tiny))
    still = torch.zeros(len(ROWS), 1, 3)
    for row, (emotion, strength) in enumerate(ROWS):
        if emotion >= 0:
            still[row, 0, emotion] = strength
    plan, usual = SteeringPlan.over(Course(vectors, still)), plan_for(vectors, [e for e, _ in ROWS], [s for _, s in ROWS])
    assert plan.course is None and plan.vectors.keys() == usual.vectors.keys()
    for site, value in usual.vectors.items():
        assert torch.equal(plan.vectors[site], value)


def test_a_sum_does_not_depend_on_the_rows_beside_it() -> None:
    draw = torch.Generator().manual_seed(0)
    course = Course({Site(0, ATTN_OUT): torch.randn(6, 500, generator=draw)}, torch.randn(7, 3, 6, generator=draw))
    for row in range(7):
        assert torch.equal(course.rows([row]).at(1)[Site(0, ATTN_OUT)][0], course.at(1)[Site(0, ATTN_OUT)][row])
    assert torch.equal(course.at(5)[Site(0, ATTN_OUT)], course.at(2)[Site(0, ATTN_OUT)])
    assert course.moves_at(2) and not course.moves_at(3) and not course.moves_at(0)


@pytest.mark.parametrize("both", [False, True])
def test_engines_take_another_steering_between_steps(tiny: Model, both: bool) -> None:
    """Also where what is added to the MLP's output and to the layer's is one sum, and after rows have left."""
    draw = torch.Generator().manual_seed(1)
    sites = [Site(0, ATTN_OUT), Site(1, MLP_OUT), *([Site(1, RESID_POST)] if both else [])]
    first, second = ({site: torch.randn(3, tiny.shape.d_model, generator=draw) for site in sites} for _ in range(2))
    prompts, tokens = PROMPTS[:3], torch.tensor([5, 9, 7])
    plan = SteeringPlan(first, 3)
    engines = [engine_for(tiny, prompts, plan, None, 8), HookedEngine(tiny, prompts, Injector(plan, tiny.device, tiny.dtype), None)]
    assert isinstance(engines[0], LeanEngine)
    rows = []
    with torch.no_grad():
        for engine in engines:
            engine.step(None)
            engine.keep([0, 2])
            unchanged = engine.step(tokens[[0, 2]])
            engine.steer({site: value[[0, 2]] for site, value in second.items()})
            steered = engine.step(tokens[[1, 2]])
            engine.keep([1])
            rows += [unchanged, steered, engine.step(tokens[[1]])]
    for lean, hooked in zip(rows[:3], rows[3:], strict=True):
        assert (lean - hooked).abs().max() <= forward_bound(hooked)
    alone = engine_for(tiny, prompts, SteeringPlan(first, 3), None, 8)
    with torch.no_grad():
        alone.step(None)
        alone.keep([0, 2])
        alone.step(tokens[[0, 2]])
        assert (alone.step(tokens[[1, 2]]) - rows[1]).abs().max() > 0.01
