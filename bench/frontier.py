"""How small a circuit can be: circuits of seven sizes, chosen in several ways and all learned alike, with matched random ones beside them.

    python -m bench.frontier learn --directions FILE --out DIR          # the circuits and their margins, about three minutes a selection
    python -m bench.frontier read --out DIR --sizes 0.05                # what they write, as the panel reads it
    python -m bench.frontier show --out DIR                             # the tables, and frontier.json

Every selection starts from the same values, learned with all units, and goes down through the sizes with fitting on between them: the same
prompts, comparisons and steps for all. What is there already is not made again. Margins are measured on prompts of the training file that
nothing here is learned from; replies are written to development prompts. The strength of every circuit is the one of the same few with the
most good replies to `--choose` of the prompts; what is shown is measured on `--prompts` others.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.frontier_replies import figure, places, read, show
from emosteer.attribution.gradients import importance_and_effects, prompt_samples
from emosteer.attribution.unit_scores import UnitScores, unit_mask
from emosteer.base.errors import EmosteerError, UsageError, suggest
from emosteer.base.files import atomic_path, slug, write_text
from emosteer.base.jsonl import KeyedLog
from emosteer.base.progress import note
from emosteer.circuits.assemble import circuit_of, learned_units
from emosteer.circuits.budget import choice_of
from emosteer.circuits.circuit import Circuit
from emosteer.circuits.faithfulness import at_length_of, compiled_sets, injected_effect
from emosteer.circuits.learning import Choice, Compared, Comparisons, learn, margins
from emosteer.circuits.name_sparing import without_names
from emosteer.circuits.places import DEFAULT_MODEL
from emosteer.circuits.precision import chosen_dtype
from emosteer.circuits.schedule import Schedule
from emosteer.circuits.selection import Ranked, Worth, shuffled
from emosteer.circuits.settings import SELECTIONS, CircuitSettings, GainSettings
from emosteer.circuits.unit_outputs import UnitOutputs, unit_outputs
from emosteer.directions.activations import Sample
from emosteer.directions.directions import Directions, reference_directions, stable_band
from emosteer.models.dense_attention import dense_attention
from emosteer.models.model import Model
from emosteer.models.sites import Head
from emosteer.scenarios.scenarios import Bank, Group
from emosteer.scenarios.shipped import read_data
from emosteer.scenarios.splits import spread

SIZES = (0.5, 0.25, 0.1, 0.05, 0.02, 0.01, 0.005)
#: Steps with all units, before the selections part, and with every size; prompts a step; steps of learning gates.
TRUNK, EACH, GATE_STEPS = 24, 6, 36
#: Steps at a time by which a single circuit is fitted on.
PART = 30
#: Training prompts that are kept back for the margins; prompts that the final score is taken on; the size that gates are learned for.
HELD_OUT, SCORED, GATE_BUDGET = 10, 3, 0.05


#: Tensors by name, as they are kept between sizes.
State = dict[str, Tensor]


@dataclass(eq=False)
class Frontier:
    """What every selection has in common. Several processes may work in one folder, each on other selections."""

    model: Model
    directions: Directions
    learned_from: Sequence[Group]
    held_out: Sequence[Group]
    bank: Bank
    settings: GainSettings
    folder: Path

    @classmethod
    def open(cls, options: argparse.Namespace) -> Frontier:
        """Loads the model, the directions and the training prompts."""
        model = Model.load(options.model, dtype=options.dtype)
        directions = Directions.load(options.directions)
        data = read_data(None, options.replies, "reply")
        assert data.bank is not None
        held_out = spread(data.groups, HELD_OUT)
        rest = [group for group in data.groups if group not in held_out]
        settings = GainSettings(groups=options.prompts_a_step, seed=options.seed, dtype=options.gradients)
        settings = replace(settings, dtype=chosen_dtype(model, settings.dtype))
        options.out.mkdir(parents=True, exist_ok=True)
        return cls(model, directions, rest, held_out, data.bank, settings, options.out)

    # ---- learning ----------------------------------------------------------------------------------------------------

    def outputs(self, units: str) -> UnitOutputs:
        """What is learned, of some kinds of units, going on from the trunk."""
        z = without_names(self.model, self.directions.emotions, self.directions.z.mean)
        settings = replace(self.settings, budget=1.0, units=units)
        return unit_outputs(self.model, z, self.directions.mlp.mean, self.directions.emotions, True, settings)

    def fit(self, what: UnitOutputs, schedule: Schedule, choice: Choice, seed: int, **more: Any) -> None:
        """One run of learning."""
        context = (self.learned_from, self.bank, self.directions.emotions, self.directions.instruction)
        learn(self.model, what, *context, replace(self.settings, seed=seed), schedule=schedule, choice=choice, **more)

    def trunk(self, what: UnitOutputs, units: str) -> State:
        """What is learned with all units, before the selections part."""

        def make() -> State:
            worth, found = Worth(what), list[Tensor]()
            self.fit(what, Schedule(TRUNK, {}, (TRUNK,)), worth, self.settings.seed, at_end=lambda _, values: found.append(values))
            return {"values": found[0], "worth": torch.as_tensor(worth.worth)}

        return self.state(f"trunk-{units}", make)

    def descend(self, selection: str) -> Iterator[None]:
        """One selection, down through all sizes; a circuit and its margin at each. The optimiser starts anew with every size, so that an
        interrupted descent goes on as it would have."""
        name, _, units = selection.partition(":")
        units = units or "both"
        what = self.outputs(units)
        state = self.trunk(what, units)
        yield
        choice = self.choice(name, what, units)
        yield
        kept = KeyedLog(self.folder / "margins" / f"{slug(selection.replace(':', '/'))}.jsonl")
        for number, size in enumerate(SIZES):

            def make(state: State = state, number: int = number, size: float = size) -> State:
                if isinstance(choice, Worth):
                    choice.worth = state["worth"].to(what.heads.first)
                found = list[Tensor]()
                schedule, begun = Schedule(EACH, {0: size}, (EACH,)), replace(what, begin=state["values"])
                self.fit(begun, schedule, choice, self.settings.seed + 1 + number, at_end=lambda _, values: found.append(values))
                return {"values": found[0], "worth": torch.as_tensor(choice.worth) if isinstance(choice, Worth) else state["worth"]}

            state = self.state(f"{slug(selection.replace(':', '/'))}_{size:g}", make)
            if f"{selection} {size:g}" not in kept.rows:
                kept.add({f"{selection} {size:g}": self.keep(selection, size, what, state["values"])})
            yield
        for size in SIZES:
            if f"score of {selection} {size:g}" not in kept.rows:
                score = self.scores(Circuit.load(self.path(selection, size), self.model))
                kept.add({f"score of {selection} {size:g}": {"selection": selection, "size": size, "score": score}})
            yield

    def fit_on(self, selection: str, size: float, parts: int) -> Iterator[None]:
        """Goes on fitting one circuit, with the units that it has, `PART` steps at a time; the circuit "SELECTION+N" after all N parts."""
        what = self.outputs(selection.partition(":")[2] or "both")
        state = load_file(self.folder / "state" / f"{slug(selection.replace(':', '/'))}_{size:g}.safetensors")
        kept = KeyedLog(self.folder / "margins" / f"{slug(selection.replace(':', '/'))}+{parts}.jsonl")
        for number in range(1, parts + 1):

            def make(state: State = state, number: int = number) -> State:
                found, begun = list[Tensor](), replace(what, begin=state["values"])
                left = Ranked(what, (what.by_unit(state["values"].abs()) > 0).float())
                schedule = Schedule(PART, {0: size}, (PART,))
                seed = self.settings.seed + 1000 + number
                self.fit(begun, schedule, left, seed, at_end=lambda _, values: found.append(values))
                return {"values": found[0], "worth": state["worth"]}

            state = self.state(f"{slug(selection.replace(':', '/'))}+{number}_{size:g}", make)
            yield
        name = f"{selection}+{parts}"
        if f"{name} {size:g}" not in kept.rows:
            kept.add({f"{name} {size:g}": self.keep(name, size, what, state["values"])})

    def state(self, name: str, make: Callable[[], State]) -> State:
        """Tensors by name, from the file of that name, which is made where it is not there."""
        path = self.folder / "state" / f"{name}.safetensors"
        if not path.exists():
            made = {key: value.detach().cpu().contiguous() for key, value in make().items()}
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as part:
                save_file(made, part)
        return load_file(path)

    def choice(self, name: str, what: UnitOutputs, units: str) -> Choice:
        """By which units are left: as `emosteer circuit --select` has it, or "random-N", matched in layers to "gradual" at every size."""
        if name == "gradual":
            return Worth(what)
        if name.startswith("random"):
            reference = self.survival("gradual" if units == "both" else f"gradual:{units}")
            return Ranked(what, what.row(shuffled(reference, int(name.partition("-")[2] or 0))))

        def make() -> State:
            settings = replace(self.settings, select=name, steps=GATE_STEPS, budget=GATE_BUDGET, units=units)
            found = choice_of(self.model, what, self.learned_from, self.bank, self.directions, settings)
            assert isinstance(found, Ranked)
            return {"scores": found.scores}

        return Ranked(what, self.state(f"ranking-{slug(name)}-{units}", make)["scores"].to(what.heads.first))

    def survival(self, selection: str) -> UnitScores:
        """At how many sizes each unit was still in a selection's circuits."""
        shape, n = self.model.shape, len(self.directions.emotions)
        heads = torch.zeros(n, shape.n_layers, shape.n_heads)
        neurons = torch.zeros(n, shape.n_layers, shape.d_mlp)
        for size in SIZES:
            path = self.path(selection, size)
            if not path.exists():
                raise UsageError(f"random circuits are matched to those of '{selection}'; learn it first")
            circuit = Circuit.load(path)
            heads += circuit.heads
            neurons[tuple(circuit.neuron_index.T)] += 1
        return UnitScores(heads, neurons)

    # ---- what is kept ------------------------------------------------------------------------------------------------

    def path(self, selection: str, size: float) -> Path:
        """Where a circuit lies."""
        return self.folder / f"{slug(selection.replace(':', '/'))}_{size:g}.safetensors"

    def keep(self, selection: str, size: float, what: UnitOutputs, values: Tensor) -> dict[str, Any]:
        """Writes a circuit; returns the row of its margin."""
        z, neurons = what.outputs(values)
        d = self.directions
        learned = replace(d, z=replace(d.z, mean=z), mlp=replace(d.mlp, mean=neurons))
        budgeted = replace(self.settings, budget=size)
        sets = [learned_units(self.model, learned, e, budgeted) for e in range(len(d.emotions))]
        metrics = {
            "gains": {
                **vars(budgeted),
                "select": selection,
                "steps": TRUNK + EACH * (SIZES.index(size) + 1) + PART * int(selection.partition("+")[2] or 0),
            }
        }
        settings = CircuitSettings(seed=self.settings.seed)
        circuit = circuit_of(self.model, learned, sets, self.importance, settings, metrics, d.provenance.data, {})
        circuit.save(self.path(selection, size))
        margin, heads = self.margin(circuit), sum(isinstance(unit, Head) for unit in sets[0])
        row = {"selection": selection, "size": size, "heads": heads, "neurons": len(sets[0]) - heads}
        note(f"frontier: {selection} at {size:g}: margin {sum(margin.values()) / len(margin):.3f}")
        return {**row, "margin": margin}

    @torch.no_grad()
    def margin(self, circuit: Circuit) -> dict[str, float]:
        """Emotion -> how many nats per token more the other replies to prompts that nothing was learned from cost, at strength 1."""
        added = circuit.steering(self.model)
        data, draw = Comparisons.of(self.held_out, self.bank, self.directions.emotions), random.Random(0)
        found = torch.zeros(len(circuit.emotions))
        with dense_attention(self.model):
            for group in data.usable:
                compared = Compared.draw(group, data, replace(self.settings, others=3), draw)
                found += margins(self.model, compared, added, self.directions.instruction).cpu()
        return dict(zip(circuit.emotions, (found / len(data.usable)).tolist(), strict=True))

    @cached_property
    def v_ref(self) -> Tensor:
        """What the final score projects on."""
        return reference_directions(self.directions, stable_band(self.directions))

    @cached_property
    def samples(self) -> list[Sample]:
        """Prompts that scores are measured on."""
        n = len(self.directions.emotions)
        return prompt_samples(self.model, self.learned_from, SCORED, n, self.directions.instruction)

    @cached_property
    def importance(self) -> Tensor:
        """Of the sublayers, which a circuit's file holds."""

        def make() -> State:
            return {"importance": importance_and_effects(self.model, self.samples, self.directions, self.v_ref)[0]}

        return self.state("importance", make)["importance"]

    def scores(self, circuit: Circuit) -> dict[str, float]:
        """Emotion -> change of the final score at strength 1, as a share of the change by all heads' plain contrast at the same length."""
        mine, found = circuit.steering(self.model), {}
        whole = unit_mask(self.model, [Head(i, j) for i in range(self.model.shape.n_layers) for j in range(self.model.shape.n_heads)])
        for e, emotion in enumerate(circuit.emotions):
            plain = compiled_sets(self.model, self.directions, e, [whole, whole], True)
            own = {site: value[e : e + 1].expand(2, -1) for site, value in mine.items()}
            effect, total = injected_effect(self.model, self.samples, at_length_of(own, 0, plain, keep=(0,)), self.v_ref[e]).tolist()
            found[emotion] = effect / total if total else 0.0
        return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one of the three parts; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.frontier", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("learn", "read", "show"))
    parser.add_argument(
        "--out", type=Path, default=Path("artifacts/frontier"), metavar="DIR", help="where circuits, replies and figures go"
    )
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--directions", type=Path, metavar="FILE", help="what `emosteer extract` wrote")
    parser.add_argument("--replies", type=Path, metavar="FILE", help="the bank; the shipped one if not given")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--gradients", default="auto", help="precision of the gradients of a float32 model")
    parser.add_argument("--prompts-a-step", type=int, default=1, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    known = (*SELECTIONS, "random-0", "random-1", "random-2")
    parser.add_argument(
        "--selections", default=",".join(known), help=f"of {', '.join(known)}; heads alone with ':heads', as in gradual:heads"
    )
    parser.add_argument("--fit-on", type=int, default=0, metavar="N", help=f"fit circuits of --sizes on, N times {PART} steps, instead")
    parser.add_argument("--minutes", type=float, default=0, help="stop learning at the next chance after so many; 0 goes on to the end")
    parser.add_argument("--sizes", default="0.05", help="whose circuits are read")
    parser.add_argument("--choose", type=int, default=8, metavar="N", help="development prompts that a circuit's strength is chosen on")
    parser.add_argument("--prompts", type=int, default=32, metavar="N", help="others, that it is measured on")
    parser.add_argument("--strengths", default="0.6,0.9,1.3,1.9,2.7", help="that are tried for every circuit")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="with `show`: draw the margins as SVG")
    parser.add_argument(
        "--circuits", type=Path, nargs="*", default=[], metavar="FILE", help="further circuits to read, such as the shipped one"
    )
    options = parser.parse_args(arguments)
    try:
        chosen = options.selections.split(",")
        if options.part == "learn":
            learn_all(options, chosen)
        elif options.part == "read":
            read(options, chosen)
        else:
            print(show(options.out), places(options.out, [float(size) for size in options.sizes.split(",")]), sep="\n\n")
            if options.figure:
                write_text(options.figure, figure(options.out))
    except EmosteerError as error:
        print(f"frontier: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def learn_all(options: argparse.Namespace, chosen: Sequence[str]) -> None:
    """Every selection that is not there yet.

    Raises:
        UsageError: if a selection is unknown, or no directions are given.
    """
    if options.directions is None:
        raise UsageError("expected --directions FILE, what `emosteer extract` wrote")
    for selection in chosen:
        name = selection.partition(":")[0]
        if name not in SELECTIONS and not name.startswith("random"):
            raise UsageError(f"unknown selection '{name}'{suggest(name, SELECTIONS)}; expected {', '.join(SELECTIONS)} or random-N")
    frontier = Frontier.open(options)
    begin = time.monotonic()
    for selection in chosen:
        sizes = [float(size) for size in options.sizes.split(",")] if options.fit_on else []
        runs = [frontier.fit_on(selection, size, options.fit_on) for size in sizes] or [frontier.descend(selection)]
        for _ in chain.from_iterable(runs):
            if options.minutes and time.monotonic() - begin > 60 * options.minutes:
                note(f"frontier: stopped after {options.minutes:g} minutes; the same command goes on")
                return
    (options.out / "settings.json").write_text(json.dumps({**vars(frontier.settings), "trunk": TRUNK, "each": EACH}, indent=1))


if __name__ == "__main__":
    sys.exit(main())
