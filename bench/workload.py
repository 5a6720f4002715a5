"""What the families of the benchmark share: the models, the prompts and the size of the work."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

from torch import Tensor

from emosteer.circuits.circuit import Circuit
from emosteer.circuits.places import packaged_circuit
from emosteer.directions.activations import Sample, tokenize_group
from emosteer.directions.settings import Settings
from emosteer.generation.decoding import Decoding
from emosteer.generation.generate import Request
from emosteer.generation.steering import SteeringPlan, plan_for
from emosteer.models.model import Model
from emosteer.models.sites import Site
from emosteer.scenarios.prompts import INSTRUCTION, plain
from emosteer.scenarios.scenarios import EMOTIONS, VALENCES, Group, data_path, groups_of, read_scenarios
from emosteer.scenarios.shipped import Data, read_data

#: The model that every figure is measured on, the packaged default.
MODEL = "smollm2-135m"


class Workbench:
    """Models and data, read once and on first use.

    quick: small work and few rounds, to see that everything runs; wants: whether a row is to be measured.
    """

    def __init__(self, quick: bool = False, wants: Callable[[str], bool] = lambda row: True, model: str = MODEL) -> None:
        self.quick, self.wants, self.reference = quick, wants, model
        self._models: dict[str, Model] = {}

    def pick(self, full: int, quick: int) -> int:
        """One of two sizes."""
        return quick if self.quick else full

    def model(self, dtype: str = "float32") -> Model:
        """The model in a precision."""
        if dtype not in self._models:
            self._models[dtype] = Model.load(self.reference, device="cpu", dtype=dtype)
        return self._models[dtype]

    def forget(self) -> None:
        """Drops the models, so that one family's memory is not another's."""
        self._models.clear()
        gc.collect()

    def data(self, groups: int) -> Data:
        """The training scenario-events and their replies, spread over all themes."""
        return read_data(None, None, limit=groups)

    def samples(self, groups: int) -> list[Sample]:
        """Token ids of scenario-events with their replies (the `reply` elicitation)."""
        data = self.data(groups)
        assert data.bank is not None
        model = self.model()
        return [tokenize_group(model, group, "reply", EMOTIONS, data.bank[group.key], INSTRUCTION) for group in data.groups]

    @cached_property
    def circuit(self) -> Circuit:
        """The circuit shipped for the model."""
        path = packaged_circuit(self.model().name)
        assert path is not None
        return Circuit.load(path)

    @cached_property
    def vectors(self) -> dict[Site, Tensor]:
        """The circuit compiled: site -> [emotion, d_model]."""
        return self.circuit.steering(self.model())

    @cached_property
    def prompts(self) -> list[Group]:
        """Test scenario-events, none of which made the circuit; the first event of every scenario, then the second, then the third: prompts
        that follow one another share no text of their own, which a fast path could compute once."""
        groups = groups_of(read_scenarios(data_path("sev/test.jsonl")))
        return [group for start in range(len(VALENCES)) for group in groups[start :: len(VALENCES)]]

    def requests(self, count: int) -> list[Request]:
        """Unsteered prompts, as `generate` writes them."""
        model = self.model()
        chosen = [self.prompts[index % len(self.prompts)] for index in range(count)]
        return [Request(f"{index}/{group.key}", tuple(model.prompt_ids(plain(group.text)))) for index, group in enumerate(chosen)]

    def plan(self, emotions: Sequence[int]) -> SteeringPlan:
        """The circuit at its default strengths, one emotion per row."""
        return plan_for(self.vectors, emotions, [self.circuit.strength[e].item() for e in emotions])


def settings(packed: bool = True) -> Settings:
    """Extraction as the command does it on a CPU."""
    return Settings(EMOTIONS, packed=packed)


def decoding(new_tokens: int) -> Decoding:
    """Greedy with the repetition penalty that every figure uses."""
    return Decoding(max_new_tokens=new_tokens)


@contextlib.contextmanager
def endless(model: Model) -> Iterator[None]:
    """Replies go on to their full length, so that all contenders write the same number of tokens."""
    kept = model.stop_ids
    model.__dict__["stop_ids"] = frozenset({-1})  # a cached property; no token has this number
    try:
        yield
    finally:
        model.__dict__["stop_ids"] = kept
