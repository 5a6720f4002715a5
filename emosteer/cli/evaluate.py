"""`emosteer evaluate`: the contest of all methods. Imports are inside: --help is instant."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from emosteer.base.errors import ArtifactError, UsageError
from emosteer.circuits.methods import CONTEST, METHODS, NONE
from emosteer.circuits.places import ARTIFACTS
from emosteer.cli.command_line import command_line
from emosteer.cli.options import (
    DEFAULT_MODEL,
    DeviceMapOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    RootOption,
    SeedOption,
    finite,
    listed,
)
from emosteer.evaluation.settings import Budget, EvaluationSettings
from emosteer.generation.decoding import Decoding
from emosteer.judges.registry import EMBEDDED, JUDGE_FORMS, KEY_ENV, PARALLEL
from emosteer.scenarios.scenarios import Group, data_path, groups_of, read_scenarios
from emosteer.scenarios.splits import split, spread, unread
from emosteer.writing.settings import CONTEST_BATCH_SIZE

if TYPE_CHECKING:
    from emosteer.base.processes import Crew
    from emosteer.circuits.circuit import Circuit
    from emosteer.circuits.places import Places
    from emosteer.directions.directions import Directions
    from emosteer.judges.jury import Jury
    from emosteer.models.model import Model
    from emosteer.writing.contest_writer import ContestWriter

#: Methods that take the directions.
NEEDING = tuple(method for method in CONTEST if METHODS[method].needs_directions)
DOSES = listed(EvaluationSettings.doses)
#: A look, not a result: minutes on the default model.
FAST = {"groups": 12, "dev_groups": 6, "doses": "0.5,1,1.5"}
FULL = {"groups": 160, "dev_groups": 24, "doses": DOSES}


@dataclass(frozen=True)
class Splits:
    """Who is written to. A file is given by name, with its hash."""

    dev: list[Group]
    test: list[Group]
    dev_file: Path
    test_file: Path

    def described(self) -> dict[str, Any]:
        """The part of evaluation.json."""
        from emosteer.base.files import sha256_file

        return {
            name: {"n_groups": len(groups), "file": file.name, "sha256": sha256_file(file)}
            for name, groups, file in (("dev", self.dev, self.dev_file), ("test", self.test, self.test_file))
        }


def evaluate(
    context: typer.Context,
    model: ModelOption = DEFAULT_MODEL,
    circuit: Annotated[Path | None, typer.Option(help="Circuit file; else artifacts/, else the shipped one.", metavar="FILE")] = None,
    directions: Annotated[
        Path | None, typer.Option(help=f"What the circuit was made from, for {', '.join(NEEDING)}; else artifacts/.", metavar="FILE")
    ] = None,
    scenarios: Annotated[
        Path | None, typer.Option(help="SEV file to test on; the shipped test set if not given.", metavar="FILE", show_default=False)
    ] = None,
    groups: Annotated[int | None, typer.Option(min=0, help="Test scenario-events, 160 if not given; 0 is all.", show_default=False)] = None,
    skip: Annotated[int, typer.Option(min=0, help="Leave out as many test scenario-events first: those read before.")] = 0,
    dev_groups: Annotated[
        int | None, typer.Option(min=1, help="Scenario-events that strengths are chosen on, 24 if not given.", show_default=False)
    ] = None,
    doses: Annotated[
        str | None,
        typer.Option(help=f"Strengths tried, in default strengths; {DOSES} if not given.", show_default=False, metavar="A,B,..."),
    ] = None,
    budget: Annotated[float, typer.Option(help="Highest perplexity ratio that a chosen strength may have.")] = Budget.ratio,
    methods: Annotated[
        str | None, typer.Option(help="Who takes part, with commas; everybody if not given.", show_default=False, metavar="A,B,...")
    ] = None,
    judge: Annotated[str, typer.Option(help=f"{JUDGE_FORMS}.", metavar="SPEC")] = EMBEDDED,
    base_url: Annotated[str | None, typer.Option(help="Of an OpenAI-compatible judge.", show_default=False)] = None,
    key_env: Annotated[str, typer.Option(help="The environment variable that holds its key.")] = KEY_ENV,
    parallel: Annotated[int, typer.Option(min=1, max=64, help="Requests to it at a time.")] = PARALLEL,
    fast: Annotated[bool, typer.Option("--fast", help="A quick look: few scenario-events, three strengths.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Longest reply, in tokens.")] = Decoding.max_new_tokens,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = Decoding.temperature,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling; 1 is all.")] = Decoding.top_p,
    repetition_penalty: Annotated[float, typer.Option(help="1 is none.")] = Decoding.repetition_penalty,
    seed: SeedOption = EvaluationSettings.seed,
    batch_size: Annotated[int, typer.Option(min=1, help="Replies written at once.")] = CONTEST_BATCH_SIZE,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for results and cache; artifacts/MODEL/evaluation/.", metavar="DIR")
    ] = None,
    device: DeviceOption = "auto",
    device_map: DeviceMapOption = None,
    dtype: DtypeOption = "auto",
    root: RootOption = ARTIFACTS,
    as_json: JsonOption = False,
) -> None:
    """Hold the contest: prompts, residual steering, the circuit and random controls, judged blind. A rerun goes on."""
    sizes = {**FULL, **(FAST if fast else {}), **_given(groups=groups, dev_groups=dev_groups, doses=doses)}
    decoding = Decoding(max_new_tokens, finite(temperature, "--temperature") or 0.0, top_p, repetition_penalty, seed)
    settings = _settings(methods, sizes["doses"], sizes["dev_groups"], finite(budget, "--budget") or 0.0, seed)
    splits = _splits(scenarios, sizes["groups"], skip, sizes["dev_groups"])
    from emosteer.base.files import sha256_file, write_jsonl, write_text
    from emosteer.base.jsonl import KeyedLog
    from emosteer.base.processes import join
    from emosteer.circuits.circuit import default_strengths
    from emosteer.circuits.places import Places, require_circuit
    from emosteer.cli.print_contest import print_evaluation
    from emosteer.evaluation.evaluate import evaluate as hold
    from emosteer.judges.huggingface import refuse_same_weights
    from emosteer.judges.jury import make_jury
    from emosteer.models.model import Model

    crew = join()
    # one process judges: opinions may cost money, and what a local judge says depends on the texts that it reads together
    panel = make_jury(judge, base_url=base_url, key_env=key_env, parallel=parallel, device=device) if crew.lead else None
    loaded = Model.load(model, device=device, dtype=dtype, device_map=device_map)
    found, path = require_circuit(loaded, circuit, root)
    places = Places.of(loaded.name, root)
    folder = out or places.folder / "evaluation"
    jury = panel(KeyedLog(folder / "opinions.jsonl")) if panel is not None else None
    if jury is not None:
        refuse_same_weights(jury.judge, loaded.sha256)
    settings, known = _with_directions(settings, loaded, found, directions, places, methods is not None)
    contest = _contest(loaded, found, known, settings, decoding, batch_size, folder, crew)
    if jury is None:
        contest.serve()
        return
    contest.adopt()
    body, rows = hold(contest, jury, splits.dev, splits.test, default_strengths(found, settings.methods), settings)
    crew.tell("over")
    result = {
        "schema": 1,
        "kind": "evaluation",
        "model": loaded.name,
        "model_sha256": loaded.sha256,
        "circuit_sha256": sha256_file(path),
        "command": command_line(context),
        **_provenance(contest, jury, seed),
        **splits.described(),
        **body,
    }
    write_jsonl(folder / "test-replies.jsonl", rows)
    text = json.dumps(result, indent=1, ensure_ascii=False)
    write_text(folder / "evaluation.json", text + "\n")
    typer.echo(text) if as_json else print_evaluation(result, str(folder / "evaluation.json"))


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _settings(methods: str | None, doses: str, dev_groups: int, budget: float, seed: int) -> EvaluationSettings:

    try:
        grid = tuple(sorted({float(part) for part in doses.split(",") if part.strip()}))
    except ValueError as error:
        raise UsageError(f"expected --doses to be numbers with commas, found '{doses}'") from error
    named = [part.strip() for part in methods.split(",") if part.strip()] if methods is not None else list(CONTEST)
    unknown = [name for name in named if name not in CONTEST]
    order = tuple(name for name in CONTEST if name in {*named, NONE})  # every ratio refers to the unsteered replies
    return EvaluationSettings(tuple(unknown) or order, grid, control_groups=max(2, dev_groups // 2), budget=Budget(ratio=budget), seed=seed)


def _splits(scenarios: Path | None, groups: int, skip: int, dev_groups: int) -> Splits:
    train, test = data_path("sev/train.jsonl"), scenarios or data_path("sev/test.jsonl")
    dev = spread(groups_of(split(read_scenarios(train), 0.2, 0)[1]), dev_groups)
    return Splits(dev, unread(groups_of(read_scenarios(test)), groups, skip), train, test)


def _with_directions(
    settings: EvaluationSettings, model: Model, circuit: Circuit, given: Path | None, places: Places, insisted: bool
) -> tuple[EvaluationSettings, Directions | None]:
    """The directions, for the methods that need them. Where there are none, these are left out, unless methods were asked for.

    Raises:
        ArtifactError: if they are needed and missing, or another model's.
    """
    from dataclasses import replace

    from emosteer.base.files import sha256_file
    from emosteer.base.progress import note
    from emosteer.circuits.places import require_directions

    needing = [method for method in settings.methods if method in NEEDING]
    if not needing:
        return settings, None
    who = " and ".join(needing)
    if given is None and not places.directions.exists():
        message = (
            f"{who} needs the directions of {model.name} ({places.directions}); make them with `emosteer extract`, or name --directions"
        )
        if insisted:
            raise ArtifactError(message)
        note(f"left out: {message}")
        return replace(settings, methods=tuple(method for method in settings.methods if method not in needing)), None
    found, path = require_directions(model, given, places)
    if circuit.provenance.parents.get("directions") not in (None, sha256_file(path)):
        note(f"the circuit was made from other directions than {path}; {who} takes its contrasts from these")
    return settings, found


def _contest(
    model: Model,
    circuit: Circuit,
    directions: Directions | None,
    settings: EvaluationSettings,
    decoding: Decoding,
    batch_size: int,
    folder: Path,
    crew: Crew,
) -> ContestWriter:
    from emosteer.base.jsonl import KeyedLog
    from emosteer.base.processes import part
    from emosteer.evaluation.controls import added_key, vectors_of
    from emosteer.writing.contest_writer import ContestWriter

    return ContestWriter(
        model=model,
        emotions=circuit.emotions,
        vectors={m: vectors_of(model, circuit, directions, m, settings.seed) for m in settings.methods},
        added={m: added_key(circuit, directions, m, settings.seed) for m in settings.methods},
        decoding=decoding,
        instruction=circuit.instruction,
        replies=KeyedLog(part(folder / "replies.jsonl", crew.rank)),
        batch_size=batch_size,
        crew=crew,
    )


def _provenance(contest: ContestWriter, jury: Jury, seed: int) -> dict[str, Any]:
    """How it was done. No clock time: the same contest gives the same bytes."""
    from emosteer.base.artifacts import versions

    return {
        "emosteer": versions()["emosteer"],
        "versions": versions(),
        "judge": {"name": jury.judge.name, "key": jury.judge.key, "soundness": jury.soundness.key},
        "decoding": vars(contest.decoding),
        "instruction": contest.instruction,
        "dtype": str(contest.model.dtype).removeprefix("torch."),
        "emotions": list(contest.emotions),
        "added": dict(contest.added),
        "seed": seed,
    }
