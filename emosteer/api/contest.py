"""The contest as a function: `evaluate`, and the parts of it that the command of that name uses. No torch at import."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emosteer.api.inputs import PathLike, circuit_of, directions_of, jury_of, path_of, plain_model
from emosteer.base.errors import ArtifactError
from emosteer.base.processes import ALONE, Crew
from emosteer.circuits.methods import CONTEST, METHODS, NONE
from emosteer.circuits.places import ARTIFACTS, Places
from emosteer.evaluation.settings import Budget, EvaluationSettings
from emosteer.generation.decoding import Decoding
from emosteer.judges.registry import PANEL
from emosteer.scenarios.prompt_sets import KINDS
from emosteer.scenarios.shipped import PromptSet, development_groups, unseen_groups
from emosteer.writing.settings import CONTEST_BATCH_SIZE

if TYPE_CHECKING:
    from emosteer.api.steered_model import SteeredModel
    from emosteer.circuits.circuit import Circuit
    from emosteer.directions.directions import Directions
    from emosteer.judges.jury import Jury
    from emosteer.judges.protocol import EmotionJudge
    from emosteer.models.model import Model
    from emosteer.writing.contest_writer import ContestWriter

#: Prompts of the test sets that are written to, and of the development sets that strengths are chosen on, all kinds together.
GROUPS, DEV_GROUPS = 160, 32


@dataclass(frozen=True)
class Splits:
    """Who is written to."""

    dev: PromptSet
    test: PromptSet

    @classmethod
    def of(cls, scenarios: Path | None, groups: int, skip: int, dev_groups: int, kinds: Sequence[str] = KINDS) -> Splits:
        """Shipped development prompts, and test prompts of a file or of the shipped test sets, each of some kinds."""
        test = unseen_groups(groups, skip, scenarios, kinds)
        present = [kind for kind in kinds if any(group.kind == kind for group in test.groups)]
        return cls(development_groups(dev_groups, kinds=present), test)

    def described(self) -> dict[str, Any]:
        """The part of evaluation.json."""
        return {"dev": self.dev.described(), "test": self.test.described()}


def evaluate(
    model: Model | SteeredModel,
    circuit: Circuit | PathLike | None = None,
    *,
    directions: Directions | PathLike | None = None,
    folder: PathLike | None = None,
    judge: str | EmotionJudge | Sequence[EmotionJudge] = PANEL,
    scenarios: PathLike | None = None,
    kinds: Sequence[str] = KINDS,
    groups: int = GROUPS,
    skip: int = 0,
    dev_groups: int = DEV_GROUPS,
    methods: Sequence[str] | None = None,
    doses: Sequence[float] | None = None,
    budget: float | None = None,
    decoding: Decoding | None = None,
    batch_size: int = CONTEST_BATCH_SIZE,
    seed: int = EvaluationSettings.seed,
    artifacts: PathLike = ARTIFACTS,
) -> dict[str, Any]:
    """Holds the contest: prompts, residual steering, plain and learned, the circuit and random controls, at the same decoding and judged
    blind.

    Args:
        circuit: in memory or as a file; the loaded one of a `SteeredModel`, else the model's own, by default.
        directions: what the circuit was made from, for methods that need them (random-heads), which are left out where there are none,
            as learned-residual is where the circuit has no learned vectors; what is named in `methods` is refused instead.
        folder: where replies and opinions are kept, so that the same call goes on, and where evaluation.json and test-replies.jsonl are
            written; None keeps nothing.
        judge: a specification (several judges with commas make a panel), what `make_judge` returns, or a list of such judges.
        scenarios: file to test on; kinds: of prompts; groups: test prompts, 0 is all; skip: leave out as many of each kind; dev_groups:
            prompts that strengths are chosen on.
        methods: who takes part, all by default; doses: strengths tried, in default strengths; budget: highest perplexity ratio.

    Returns:
        What `evaluation.json` holds: "results" by method, "comparisons", "chosen" strengths, "frontier", provenance.

    Raises:
        ArtifactError: if there is no circuit. UsageError, DataError: if a setting makes no sense or the judge fails.
    """
    from emosteer.base.jsonl import KeyedLog
    from emosteer.judges.huggingface import refuse_same_weights

    bare, root = plain_model(model), Path(artifacts)
    settings = settings_of(methods, EvaluationSettings.doses if doses is None else doses, dev_groups, budget, seed)
    splits = Splits.of(path_of(scenarios), groups, skip, dev_groups, kinds)
    panel = jury_of(judge)
    ready, sha256 = circuit_of(model, circuit, root)
    with contextlib.ExitStack() as stack:
        place = path_of(folder) or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        jury = panel(KeyedLog(place / "opinions.jsonl"))
        refuse_same_weights(jury.judges, bare.sha256)
        given = directions if directions is None or not isinstance(directions, (str, os.PathLike)) else Path(directions)
        settings = with_parts_of(settings, ready, methods is not None)
        settings, known = with_directions(settings, bare, ready, given, root, methods is not None)
        contest = contest_of(bare, ready, known, settings, decoding or Decoding.usual(seed=seed), batch_size, place, ALONE)
        return hold(contest, jury, splits, ready, sha256, settings, place, "emosteer.evaluate(...) from Python")


def settings_of(
    methods: Sequence[str] | None, doses: Sequence[float], dev_groups: int, budget: float | None, seed: int
) -> EvaluationSettings:
    """Who takes part, in the contest's order, at which doses. Unknown methods are refused by name.

    Args:
        methods: None is everybody; the unsteered replies, which every ratio refers to, are always there.
        dev_groups: random controls write to half of them.
    """
    named = list(CONTEST) if methods is None else list(methods)
    unknown = [name for name in named if name not in CONTEST]
    order = tuple(name for name in CONTEST if name in {*named, NONE})
    bounds = Budget() if budget is None else Budget(ratio=budget)
    return EvaluationSettings(
        tuple(unknown) or order, tuple(sorted(set(doses))), control_groups=max(2, dev_groups // 2), budget=bounds, seed=seed
    )


def with_parts_of(settings: EvaluationSettings, circuit: Circuit, insisted: bool) -> EvaluationSettings:
    """Leaves out the methods that add a part which the circuit lacks, unless methods were asked for.

    Raises:
        ArtifactError: if they were.
    """
    for method in settings.methods:
        part, needs = METHODS[method].vectors, f"{method} needs"
        if METHODS[method].shows and not circuit.examples:
            message = f"{needs} examples, which this circuit lacks; give it some with `emosteer calibrate --examples FILE`"
            settings = _without(settings, [method], message, insisted)
        if part is not None and not circuit.has(part):
            message = f"{needs} {part.value}, which this circuit lacks; make one with `emosteer circuit --learn-residual`"
            settings = _without(settings, [method], message, insisted)
    return settings


def _without(settings: EvaluationSettings, methods: Sequence[str], message: str, insisted: bool) -> EvaluationSettings:
    """The settings without some methods that cannot take part, which is said.

    Raises:
        ArtifactError: if methods were asked for.
    """
    from dataclasses import replace

    from emosteer.base.progress import note

    if insisted:
        raise ArtifactError(message)
    note(f"left out: {message}")
    return replace(settings, methods=tuple(method for method in settings.methods if method not in methods))


def with_directions(
    settings: EvaluationSettings, model: Model, circuit: Circuit, given: Directions | Path | None, root: Path, insisted: bool
) -> tuple[EvaluationSettings, Directions | None]:
    """The directions, for the methods that need them. Where there are none, these are left out, unless methods were asked for.

    Raises:
        ArtifactError: if they are needed and missing, or another model's.
    """
    from emosteer.base.progress import note

    needing = [method for method in settings.methods if METHODS[method].needs_directions]
    if not needing:
        return settings, None
    who = " and ".join(needing)
    places = Places.of(model.name, root)
    if given is None and not places.directions.exists():
        message = (
            f"{who} needs the directions of {model.name} ({places.directions}); make them with `emosteer extract`, or name --directions"
        )
        return _without(settings, needing, message, insisted), None
    directions, sha256, path = directions_of(model, given, root)
    if circuit.provenance.parents.get("directions") not in (None, sha256):
        note(f"the circuit was made from other directions than {path or 'these'}; {who} takes its contrasts from these")
    return settings, directions


def contest_of(
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
    from emosteer.writing.best_of import chooser_for
    from emosteer.writing.contest_writer import ContestWriter

    if not crew.lead:
        crew.meet()  # process 0 takes over what earlier runs left before the others open their own parts
    contest = ContestWriter(
        model=model,
        emotions=circuit.emotions,
        vectors={m: vectors_of(model, circuit, directions, m, settings.seed) for m in settings.methods},
        added={m: added_key(circuit, directions, m, settings.seed) for m in settings.methods},
        decoding=decoding,
        instruction=circuit.instruction,
        replies=KeyedLog(part(folder / "replies.jsonl", crew.rank)),
        batch_size=batch_size,
        crew=crew,
        examples=circuit.examples,
        chooser=chooser_for(model, decoding),
    )
    if crew.lead:
        contest.adopt()
        crew.meet()
    return contest


def hold(
    contest: ContestWriter,
    jury: Jury,
    splits: Splits,
    circuit: Circuit,
    circuit_sha256: str,
    settings: EvaluationSettings,
    folder: Path,
    command: str,
) -> dict[str, Any]:
    """Holds the contest and writes evaluation.json and test-replies.jsonl to the folder. Returns what the former holds.

    Args:
        command: what makes the result again.
    """
    from emosteer.base.files import write_jsonl, write_text
    from emosteer.circuits.circuit import default_strengths
    from emosteer.evaluation import evaluate as stage

    defaults = default_strengths(circuit, settings.methods)
    body, rows = stage.evaluate(contest, jury, splits.dev.groups, splits.test.groups, defaults, settings)
    contest.crew.tell("over")
    result = {
        "schema": 2,
        "kind": "evaluation",
        "model": contest.model.name,
        "model_sha256": contest.model.sha256,
        "circuit_sha256": circuit_sha256,
        "command": command,
        **_provenance(contest, jury, settings.seed),
        **splits.described(),
        **body,
    }
    write_jsonl(folder / "test-replies.jsonl", rows)
    write_text(folder / "evaluation.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return result


def _provenance(contest: ContestWriter, jury: Jury, seed: int) -> dict[str, Any]:
    """How it was done. No clock time: the same contest gives the same bytes."""
    from emosteer.base.artifacts import versions

    return {
        "emosteer": versions()["emosteer"],
        "versions": versions(),
        "judge": {"name": jury.name, "key": jury.key, "soundness": jury.soundness.key, "answers": jury.answers.key},
        "decoding": vars(contest.decoding),
        "instruction": contest.instruction,
        "examples": {emotion: len(own) for emotion, own in contest.examples.items()},
        "dtype": contest.model.precision.removeprefix("torch."),
        "emotions": list(contest.emotions),
        "added": dict(contest.added),
        "seed": seed,
    }
