"""What `make demo` runs: the whole way on the embedded model, from scenarios to steered replies, with the time each step took."""

from __future__ import annotations

import time
from pathlib import Path

from emosteer.progress import note

TEXTS = (
    "My landlord came by this morning about the lease. He said the new tenant moves in on the first.",
    "I handed in the report I had been working on for three weeks. My manager read it in front of the whole team.",
)


def main() -> None:
    """Extracts directions, builds circuits, and prints plain and steered replies; what is there already is used."""
    from emosteer.assembly import CircuitSettings, assemble
    from emosteer.extract import Settings, extract, finish_checkpoint
    from emosteer.files import sha256_file
    from emosteer.generation import Decoding
    from emosteer.model import Model
    from emosteer.options import DEFAULT_MODEL
    from emosteer.pipeline import Places, packaged_circuit, read_data, usable_directions
    from emosteer.scenarios import EMOTIONS
    from emosteer.summaries import circuit_summary, directions_summary, print_circuit, print_directions

    start = time.monotonic()

    def step(message: str) -> None:
        note(f"[{time.monotonic() - start:6.1f} s] {message}")

    step("loading the embedded model (fetched and converted once)")
    model = Model.load(DEFAULT_MODEL)
    places = Places.of(model.name)
    data = read_data(None, None)
    directions = usable_directions(model, places.directions)
    if directions is None:
        step(f"extracting emotion directions from {len(data.groups)} scenario-events")
        checkpoint = places.directions.with_name(places.directions.name + ".partial")
        directions = extract(model, data.groups, Settings(EMOTIONS), bank=data.bank, data=data.hashes, checkpoint=checkpoint)
        directions.save(places.directions)
        finish_checkpoint(checkpoint)
    print_directions({"file": str(places.directions), **directions_summary(directions)})
    step("assembling the circuits")
    circuit = assemble(model, directions, data.groups, CircuitSettings(), parents={"directions": sha256_file(places.directions)})
    circuit = _with_shipped_strength(circuit, packaged_circuit(model.name))
    circuit.save(places.circuit)
    print_circuit({"file": str(places.circuit), **circuit_summary(circuit)})
    step("writing replies: the same prompts, unsteered and with each circuit")
    _replies(model, circuit, Decoding(max_new_tokens=48))
    step("done; try: .venv/bin/emosteer generate 'Your text.' --emotion anger")


def _with_shipped_strength(circuit, shipped: Path | None):  # type: ignore[no-untyped-def]
    """The demo takes the default strengths that were tuned for the shipped circuit instead of tuning again."""
    from emosteer.circuit import Circuit

    if shipped is None:
        return circuit
    known = Circuit.load(shipped)
    return circuit.with_strength(known.strength.tolist(), known.residual_strength)


def _replies(model, circuit, decoding) -> None:  # type: ignore[no-untyped-def]
    from emosteer.scenarios import Group, GroupKey
    from emosteer.writing import Job, Writer

    for index, text in enumerate(TEXTS):
        group = Group(GroupKey(f"demo-{index}", "neutral"), "", text)
        print(f"\n> {text}")
        plain = Writer(model, None, decoding, circuit.instruction, "none")
        for _, reply in plain.write([Job.of(group, "none", "none", None)]):
            print(f"  {'unsteered':<10} {reply.text}")
        jobs = [Job.of(group, e, "circuit", circuit.strength[i].item()) for i, e in enumerate(circuit.emotions)]
        steered = dict(Writer(model, circuit, decoding, circuit.instruction, "circuit").write(jobs))
        for job in jobs:
            print(f"  {job.emotion:<10} {steered[job].text}")


if __name__ == "__main__":
    main()
