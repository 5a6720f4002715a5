"""What `make demo` runs: the whole way on the embedded model, from scenarios to steered replies, with the time each step took."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from emosteer.base.progress import note

if TYPE_CHECKING:
    from emosteer.circuits.circuit import Circuit
    from emosteer.generation.decoding import Decoding
    from emosteer.models.model import Model

TEXTS = (
    "My landlord came by this morning about the lease. He said the new tenant moves in on the first.",
    "I handed in the report I had been working on for three weeks. My manager read it in front of the whole team.",
)


#: A quarter of the shipped prompts, so that the demo takes minutes; the shipped circuit is made from all of them.
GROUPS = 144
#: Learning of the demo's circuit, a fifth of what `circuit` does, and the strength that such a circuit takes (docs/CIRCUITS.md).
STEPS, PROMPTS_PER_STEP, STRENGTH = 40, 1, 0.9
#: Apart from `artifacts/`, where `generate` would prefer the demo's circuit to the shipped one.
ROOT = Path("artifacts/demo")


def main() -> None:
    """Extracts directions, builds circuits, and prints plain and steered replies; what is there already is used."""
    from emosteer.cli.options import DEFAULT_MODEL
    from emosteer.generation.decoding import GUIDANCE, Decoding
    from emosteer.models.model import Model

    start = time.monotonic()

    def step(message: str) -> None:
        note(f"[{time.monotonic() - start:6.1f} s] {message}")

    step("loading the embedded model (fetched and converted once)")
    model = Model.load(DEFAULT_MODEL)
    circuit = _circuit(model, step)
    step("writing replies: the same prompts, unsteered and with each circuit")
    _replies(model, circuit, Decoding(max_new_tokens=48, guidance=GUIDANCE))
    step("done; now try: .venv/bin/emosteer generate 'Your text.' --emotion anger")


def _circuit(model: Model, step: Callable[[str], None]) -> Circuit:
    """Directions and circuit, made or, when they are there from an earlier run, read."""
    from emosteer.api.making import ensure_directions
    from emosteer.base.files import sha256_file
    from emosteer.circuits.assemble import assemble
    from emosteer.circuits.circuit import Circuit
    from emosteer.circuits.places import Places
    from emosteer.circuits.settings import CircuitSettings, GainSettings
    from emosteer.cli.print_artifacts import circuit_summary, directions_summary, print_circuit, print_directions
    from emosteer.scenarios.shipped import read_data

    places = Places.of(model.name, ROOT)
    data = read_data(None, None, limit=GROUPS)
    step("directions")
    directions = ensure_directions(model, places, data)
    print_directions({"file": str(places.directions), **directions_summary(directions)})
    parents = {"directions": sha256_file(places.directions)}
    circuit = Circuit.load(places.circuit, model) if places.circuit.exists() else None
    if circuit is None or circuit.provenance.parents != parents:
        step("learning the circuits")
        gains = GainSettings(steps=STEPS, groups=PROMPTS_PER_STEP)
        circuit = assemble(model, directions, data.groups, CircuitSettings(), parents=parents, bank=data.bank, gain_settings=gains)
        circuit = circuit.with_strength([STRENGTH] * len(circuit.emotions))
        circuit.save(places.circuit)
    print_circuit({"file": str(places.circuit), **circuit_summary(circuit)})
    return circuit


def _replies(model: Model, circuit: Circuit, decoding: Decoding) -> None:
    from emosteer.circuits.methods import CIRCUIT, NONE
    from emosteer.scenarios.scenarios import Group, GroupKey
    from emosteer.writing.jobs import Job
    from emosteer.writing.writer import Writer

    for index, text in enumerate(TEXTS):
        group = Group(GroupKey(f"demo-{index}", "neutral"), "", text)
        print(f"\n> {text}")
        plain = Writer(model, None, decoding, circuit.instruction, NONE)
        for _, reply in plain.write([Job.of(group, NONE, NONE, None)]):
            print(f"  {'unsteered':<10} {reply.text}")
        jobs = [Job.of(group, e, CIRCUIT, circuit.strength[i].item()) for i, e in enumerate(circuit.emotions)]
        steered = dict(Writer(model, circuit, decoding, circuit.instruction, CIRCUIT).write(jobs))
        for job in jobs:
            print(f"  {job.emotion:<10} {steered[job].text}")


if __name__ == "__main__":
    from emosteer.cli.main import guarded

    guarded(main)
