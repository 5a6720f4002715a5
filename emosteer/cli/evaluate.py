"""`emosteer evaluate`: the contest of all methods. Imports are inside: --help is instant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from emosteer.api.contest import DEV_GROUPS, GROUPS
from emosteer.base.errors import UsageError
from emosteer.circuits.methods import CONTEST, METHODS
from emosteer.circuits.places import ARTIFACTS
from emosteer.cli.announce import DryRunOption, announced
from emosteer.cli.command_line import command_line
from emosteer.cli.options import (
    DEFAULT_MODEL,
    BestOfOption,
    DeviceMapOption,
    DeviceOption,
    DtypeOption,
    GuidanceOption,
    JsonOption,
    KindsOption,
    ModelOption,
    NoExamplesOption,
    PanelOption,
    PenalisePromptOption,
    RootOption,
    SeedOption,
    listed,
    words,
)
from emosteer.evaluation.settings import Budget, EvaluationSettings
from emosteer.generation.decoding import GUIDANCE, MAX_TOKENS, Decoding
from emosteer.judges.registry import KEY_ENV, PANEL, PARALLEL
from emosteer.scenarios.prompt_sets import parse_kinds
from emosteer.writing.settings import CONTEST_BATCH_SIZE

#: Methods that take the directions.
NEEDING = tuple(method for method in CONTEST if METHODS[method].needs_directions)
DOSES = listed(EvaluationSettings.doses)
#: A look, not a result: minutes on the default model.
FAST = {"groups": 16, "dev_groups": 8, "doses": "0.5,1,1.5"}
FULL = {"groups": GROUPS, "dev_groups": DEV_GROUPS, "doses": DOSES}


def evaluate(
    context: typer.Context,
    model: ModelOption = DEFAULT_MODEL,
    circuit: Annotated[Path | None, typer.Option(help="Circuit file; else artifacts/, else the shipped one.", metavar="FILE")] = None,
    directions: Annotated[
        Path | None, typer.Option(help=f"What the circuit was made from, for {', '.join(NEEDING)}; else artifacts/.", metavar="FILE")
    ] = None,
    scenarios: Annotated[
        Path | None, typer.Option(help="Prompt file to test on; the shipped test sets if not given.", metavar="FILE", show_default=False)
    ] = None,
    groups: Annotated[
        int | None,
        typer.Option(min=0, max=1_000_000, help=f"Test prompts, evenly of all kinds, {GROUPS} if not given; 0 is all.", show_default=False),
    ] = None,
    skip: Annotated[int, typer.Option(min=0, max=1_000_000, help="Leave out as many test prompts of each kind: those read before.")] = 0,
    dev_groups: Annotated[
        int | None,
        typer.Option(min=1, max=1_000_000, help=f"Prompts that strengths are chosen on, {DEV_GROUPS} if not given.", show_default=False),
    ] = None,
    doses: Annotated[
        str | None,
        typer.Option(help=f"Strengths tried, in default strengths; {DOSES} if not given.", show_default=False, metavar="A,B,..."),
    ] = None,
    budget: Annotated[float, typer.Option(max=1000, help="Highest perplexity ratio that a chosen strength may have.")] = Budget.ratio,
    methods: Annotated[
        str | None, typer.Option(help="Who takes part, with commas; everybody if not given.", show_default=False, metavar="A,B,...")
    ] = None,
    kinds: KindsOption = "all",
    judge: PanelOption = PANEL,
    base_url: Annotated[str | None, typer.Option(help="Of an OpenAI-compatible judge.", show_default=False)] = None,
    key_env: Annotated[str, typer.Option(help="The environment variable that holds its key.")] = KEY_ENV,
    parallel: Annotated[int, typer.Option(min=1, max=64, help="Requests to it at a time.")] = PARALLEL,
    fast: Annotated[bool, typer.Option("--fast", help="A quick look: few prompts, three strengths.")] = False,
    max_new_tokens: Annotated[int, typer.Option(max=MAX_TOKENS, help="Longest reply, in tokens.")] = Decoding.max_new_tokens,
    temperature: Annotated[float, typer.Option(max=100, help="0 is greedy.")] = Decoding.temperature,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling; 1 is all.")] = Decoding.top_p,
    repetition_penalty: Annotated[float, typer.Option(max=100, help="1 is none.")] = Decoding.repetition_penalty,
    guidance: GuidanceOption = GUIDANCE,
    penalise_prompt: PenalisePromptOption = False,
    no_examples: NoExamplesOption = False,
    best_of: BestOfOption = Decoding.best_of,
    seed: SeedOption = EvaluationSettings.seed,
    batch_size: Annotated[int, typer.Option(min=1, max=100_000, help="Replies written at once.")] = CONTEST_BATCH_SIZE,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for results and cache; artifacts/MODEL/evaluation/.", metavar="DIR")
    ] = None,
    device: DeviceOption = "auto",
    device_map: DeviceMapOption = None,
    dtype: DtypeOption = "auto",
    root: RootOption = ARTIFACTS,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Hold the contest: prompts, residual steering, plain and learned, the circuit and random controls, judged blind. A rerun goes on."""
    sizes = {**FULL, **(FAST if fast else {}), **_given(groups=groups, dev_groups=dev_groups, doses=doses)}
    decoding = Decoding(max_new_tokens, temperature, top_p, repetition_penalty, seed, guidance, penalise_prompt, best_of)
    from emosteer.api.contest import Splits, contest_of, hold, with_directions, with_parts_of

    settings = _settings(methods, sizes["doses"], sizes["dev_groups"], budget, seed)
    splits = Splits.of(scenarios, sizes["groups"], skip, sizes["dev_groups"], parse_kinds(kinds))
    from emosteer.base.files import sha256_file
    from emosteer.base.jsonl import KeyedLog
    from emosteer.base.processes import join
    from emosteer.circuits.places import Places, require_circuit
    from emosteer.cli.print_contest import print_evaluation
    from emosteer.judges.huggingface import refuse_same_weights
    from emosteer.judges.jury import make_jury
    from emosteer.models.model import Model

    crew = join()
    # one process judges: opinions may cost money, and what a local judge says depends on the texts that it reads together
    panel = make_jury(judge, base_url=base_url, key_env=key_env, parallel=parallel, device=device) if crew.lead else None
    loaded = Model.load(model, device=device, dtype=dtype, device_map=device_map)
    ready, path = require_circuit(loaded, circuit, root)
    ready = ready.without_examples() if no_examples else ready
    folder = out or Places.of(loaded.name, root).folder / "evaluation"
    jury = panel(KeyedLog(folder / "opinions.jsonl")) if panel is not None else None
    if jury is not None:
        refuse_same_weights(jury.judges, loaded.sha256)
    settings = with_parts_of(settings, ready, methods is not None)
    settings, known = with_directions(settings, loaded, ready, directions, root, methods is not None)
    contest = contest_of(loaded, ready, known, settings, decoding, batch_size, folder, crew)
    if jury is None:
        if not dry_run:
            contest.serve()
        return
    from emosteer.api.costs.stages import of_evaluate
    from emosteer.circuits.circuit import default_strengths

    known_strengths, dev, test = default_strengths(ready, settings.methods), splits.dev.groups, splits.test.groups
    try:
        with announced(lambda: of_evaluate(contest, ready, jury, dev, test, known_strengths, settings), dry_run, as_json):
            result = hold(contest, jury, splits, ready, sha256_file(path), settings, folder, command_line(context))
    finally:
        contest.replies.close()
        jury.kept.close()
    if as_json:
        typer.echo(json.dumps(result, indent=1, ensure_ascii=False))
    else:
        print_evaluation(result, str(folder / "evaluation.json"))


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _settings(methods: str | None, doses: str, dev_groups: int, budget: float, seed: int) -> EvaluationSettings:
    from emosteer.api.contest import settings_of

    try:
        grid = [float(part) for part in doses.split(",") if part.strip()]
    except ValueError as error:
        raise UsageError(f"expected --doses to be numbers with commas, found '{doses}'") from error
    named = None if methods is None else words(methods)
    return settings_of(named, grid, dev_groups, budget, seed)
