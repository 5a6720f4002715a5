"""What a report is made from: the artefacts of one model, read and checked against each other. Loads no model."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emosteer.attribution.scores import Scores
from emosteer.base.artifacts import Provenance
from emosteer.base.errors import ArtifactError
from emosteer.base.files import read_jsonl, read_text, sha256_file
from emosteer.base.strict_json import loads
from emosteer.circuits.circuit import Circuit
from emosteer.circuits.heads.heads import HeadStudy
from emosteer.circuits.places import Places, packaged_circuit
from emosteer.circuits.schema import check_of_dial
from emosteer.circuits.validation.validation import Validation
from emosteer.directions.directions import Directions
from emosteer.probing.probes import Probes
from emosteer.report import commands
from emosteer.report.figures import Absent
from emosteer.report.measured import EARLIER, Measured, OutdatedError
from emosteer.report.wording import kind_counts
from emosteer.side_effects.side_effects import SideEffects


@dataclass(frozen=True)
class Source:
    """One file that the page was made from. command: what makes it again, as far as the file tells; facts: whatever else it says."""

    title: str
    file: str
    sha256: str
    command: str
    facts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Inputs:
    """Everything there is. absent: what is not, with the command that makes it; warnings: artefacts that do not belong together."""

    model: str
    directions: Directions | None
    scores: Scores | None
    circuit: Circuit | None
    check: Mapping[str, Any] | None
    contest: Measured | None
    replies: Sequence[Mapping[str, Any]]
    sources: Mapping[str, Source]
    absent: Sequence[Absent]
    warnings: Sequence[str]
    probes: Probes | None = None
    heads: HeadStudy | None = None
    effects: SideEffects | None = None
    validation: Validation | None = None

    @property
    def emotions(self) -> tuple[str, ...]:
        """The emotions, from whichever artefact is there."""
        for artefact in (self.contest, self.circuit, self.directions, self.scores):
            if artefact is not None:
                return tuple(artefact.emotions)
        return ()

    def lacks(self, name: str) -> list[Absent]:
        """The entry of a missing artefact, as a list that is empty where it is there."""
        return [item for item in self.absent if item.what == WHAT[name]]


TITLES = {"check": "Check of the intensity dial", "replies": "Test replies", "heads": "What heads do"}
WHAT = {
    "directions": "the emotion directions",
    "scores": "the scores of heads and neurons, with ablation and enhancement curves",
    "curves": "the ablation and enhancement curves",
    "circuit": "the circuit",
    "calibration": "the calibration of the intensity dial",
    "check": "the check of the intensity dial on other prompts",
    "evaluation": "the evaluation",
    "replies": "the test replies",
}
#: What every line of the test replies holds since there is a panel.
_PANEL_FIELDS = ("opinions", "answers", "kind")


def read_inputs(places: Places, model: str | None = None) -> Inputs:
    """Reads whatever is there of one model.

    Args:
        model: what the user called it; commands on the page use it.

    Raises:
        ArtifactError: if a file is damaged or there is none at all.
    """
    name = places.folder.name
    present: dict[str, Any] = {}
    outdated: dict[str, OutdatedError] = {}
    for kind, path, load in (
        ("directions", places.directions, Directions.load),
        ("scores", places.scores, Scores.load),
        ("circuit", _circuit_file(places), Circuit.load),
        ("check", places.folder / "calibration-check.json", _read_check),
        ("probes", places.probes, Probes.load),
        ("heads", places.heads, HeadStudy.load),
        ("effects", places.effects, SideEffects.load),
        ("validation", places.validation, Validation.load),
        ("evaluation", places.folder / "evaluation" / "evaluation.json", Measured.load),
        ("replies", places.folder / "evaluation" / "test-replies.jsonl", _read_replies),
    ):
        if path is not None and path.is_file():
            try:
                present[kind] = (path, load(path))
            except OutdatedError as error:
                outdated[kind] = error
    reference = model or _name(present) or name
    if outdated and not present:
        raise next(iter(outdated.values()))
    if not outdated and not set(present) - {"circuit"} and (not present or present["circuit"][0] != places.circuit):
        raise ArtifactError(f"expected artefacts of {reference} in {places.folder}, found none; {commands.first_steps(reference)}")
    value = {kind: item for kind, (_, item) in present.items()}
    sources = {kind: _source(kind, path, item, places, reference) for kind, (path, item) in present.items()}
    return Inputs(
        model=_name(present) or name,
        directions=value.get("directions"),
        scores=value.get("scores"),
        circuit=value.get("circuit"),
        check=value.get("check"),
        contest=value.get("evaluation"),
        replies=value.get("replies", []),
        sources=sources,
        absent=_absent(value, outdated, reference),
        warnings=_warnings(value, sources),
        probes=value.get("probes"),
        heads=value.get("heads"),
        effects=value.get("effects"),
        validation=value.get("validation"),
    )


def _circuit_file(places: Places) -> Path | None:
    """The model's own circuit, else the shipped one, as `evaluate` and `generate` choose."""
    return places.circuit if places.circuit.is_file() else packaged_circuit(places.folder.name)


def _read_replies(path: Path) -> list[dict[str, Any]]:
    """The judged replies of the test split.

    Raises:
        OutdatedError: if no panel read them.
    """
    rows = [row for _, row in read_jsonl(path, "file of test replies", may_be_empty=True)]
    lacking = [name for name in _PANEL_FIELDS if any(name not in row for row in rows)]
    if lacking:
        raise OutdatedError(f"expected every line of {path} to have '{lacking[0]}', found some without: {EARLIER}")
    return rows


def _read_check(path: Path) -> dict[str, Any]:
    """The check of the intensity dial on other prompts.

    Raises:
        ArtifactError: if it is none.
    """
    try:
        check = loads(read_text(path, "check of the calibration"))
    except ValueError as error:
        raise ArtifactError(f"expected {path} to be JSON, found {error}; make it again with `emosteer calibrate --check`") from error
    if not isinstance(check, dict) or check.get("kind") != "calibration-check":
        raise ArtifactError(
            f"expected {path} to be a calibration check, found something else; make it again with `emosteer calibrate --check`"
        )
    check_of_dial(check, path)
    return check


def _name(present: Mapping[str, tuple[Path, Any]]) -> str | None:
    for kind in ("circuit", "directions", "scores", "probes", "heads", "effects", "validation"):
        if kind in present:
            return str(present[kind][1].provenance.model)
    return str(present["evaluation"][1].raw["model"]) if "evaluation" in present else None


def _absent(value: Mapping[str, Any], outdated: Container[str], reference: str) -> list[Absent]:
    made = {kind: commands.maker(kind, reference) for kind in WHAT}
    lost = [Absent(WHAT[kind], made[kind]) for kind in ("directions", "scores") if kind not in value]
    if "scores" in value and not value["scores"].curves:
        lost.append(Absent(WHAT["curves"], made["curves"], "left out when the scores were made"))
    if "circuit" not in value:
        lost.append(Absent(WHAT["circuit"], made["circuit"]))
    elif not value["circuit"].metrics.get("calibration"):
        lost.append(Absent(WHAT["calibration"], made["calibration"], "not stored in the circuit"))
    elif "check" not in value:
        lost.append(Absent(WHAT["check"], made["check"]))
    for kind in ("evaluation", "replies"):
        if kind in outdated:
            lost.append(Absent(WHAT[kind], made[kind], EARLIER))
        elif not value.get(kind):
            lost.append(Absent(WHAT[kind], made[kind]))
    return lost


# ---- provenance ------------------------------------------------------------------------------------------------------


def _source(kind: str, path: Path, item: Any, places: Places, reference: str) -> Source:
    title = TITLES.get(kind, kind.capitalize())
    shipped = path.parent != places.folder and kind == "circuit"
    file = f"{path.name}, shipped with the package" if shipped else str(path.relative_to(places.folder))
    if kind == "evaluation":
        return Source(title, file, sha256_file(path), str(item.raw.get("command") or commands.maker(kind, reference)), _contest_facts(item))
    if kind == "check":
        judge, test = item.get("judge") or {}, item.get("test") or {}
        facts = {
            "model": str(item.get("model") or ""),
            "circuit": str(item.get("circuit_sha256")),
            "judge": f"{judge.get('name')} {judge.get('key')}",
            "data": _split_facts(test),
        }
        command = str(item.get("command") or commands.maker(kind, reference))
        return Source(title, file, sha256_file(path), command, {k: v for k, v in facts.items() if v})
    if kind == "replies":
        return Source(title, file, sha256_file(path), commands.maker(kind, reference), {"replies": f"{len(item):,}"})
    return Source(title, file, sha256_file(path), commands.made_by(kind, item, reference), _facts(item.provenance))


def _facts(provenance: Provenance) -> dict[str, str]:
    plain = {k: v for k, v in provenance.params.items() if not isinstance(v, (dict, list)) and v is not None}
    facts = {
        "method": provenance.method,
        "model": f"{provenance.model}, weights {provenance.model_sha256}",
        "chat template": provenance.template_sha256,
        "data": ", ".join(f"{name} {sha}" for name, sha in provenance.data.items()),
        "parents": ", ".join(f"{name} {sha}" for name, sha in provenance.parents.items()),
        "seed": str(provenance.seed),
        "settings": ", ".join(f"{k} {v}" for k, v in plain.items()),
        "versions": ", ".join(f"{name} {version}" for name, version in provenance.versions.items()),
    }
    return {name: text for name, text in facts.items() if text}


def _split_facts(split: Mapping[str, Any]) -> str:
    """How many prompts, of which kinds, from which files."""
    kinds = kind_counts(split.get("kinds"))
    files = split.get("files") or {split.get("file"): split.get("sha256")}  # a check of the dial by an earlier version names one file
    return f"{split.get('n_groups')} prompts{f' ({kinds})' if kinds else ''}, {', '.join(f'{file} {sha}' for file, sha in files.items())}"


def _contest_facts(contest: Measured) -> dict[str, str]:
    raw = contest.raw
    judge, decoding = raw.get("judge") or {}, raw.get("decoding") or {}
    parts = {split: raw.get(split) or {} for split in ("dev", "test")}
    splits = [f"{name}: {_split_facts(p)}" for name, p in parts.items() if p]
    facts = {
        "model": f"{raw['model']}, weights {raw.get('model_sha256')}",
        "circuit": str(raw.get("circuit_sha256") or ""),
        "judges": f"{judge.get('name')} {judge.get('key')}" if judge else "",
        "checks": ", ".join(f"{name} {judge[name]}" for name in ("soundness", "answers") if judge.get(name)),
        "decoding": ", ".join(f"{k} {v}" for k, v in decoding.items()),
        "instruction": str(raw.get("instruction") or ""),
        "precision": str(raw.get("dtype") or ""),
        "data": "; ".join(splits),
        "seed": str(raw.get("seed", "")),
        "versions": ", ".join(f"{name} {version}" for name, version in (raw.get("versions") or {"emosteer": raw.get("emosteer")}).items()),
        "made": str(raw.get("created") or ""),
    }
    return {name: text for name, text in facts.items() if text}


def _warnings(value: Mapping[str, Any], sources: Mapping[str, Source]) -> list[str]:
    """Artefacts that do not belong together: other weights, or a parent that is not the file on this page."""
    warnings = []
    weights = {
        kind: value[kind].provenance.model_sha256
        for kind in ("directions", "scores", "circuit", "probes", "heads", "effects", "validation")
        if kind in value
    }
    if "evaluation" in value and value["evaluation"].raw.get("model_sha256"):
        weights["evaluation"] = value["evaluation"].raw["model_sha256"]
    if len(set(weights.values())) > 1:
        parts = ", ".join(f"{kind} {sha[:12]}" for kind, sha in weights.items())
        warnings.append(f"The artefacts were made with different model weights ({parts}); figures from them must not be compared.")
    for kind, were, them in (("scores", "were", "them"), ("circuit", "was", "it")):
        parent = value[kind].provenance.parents.get("directions") if kind in value else None
        if parent and "directions" in sources and parent != sources["directions"].sha256:
            again = commands.maker(kind, value[kind].provenance.model)
            warnings.append(
                f"The {kind} {were} made from other directions ({parent[:12]}) than those shown here; `{again}` makes {them} again."
            )
    if "heads" in value:
        made = value["heads"].provenance.parents
        here = {kind: sources[kind].sha256 for kind in ("circuit", "directions") if kind in sources}
        if other := [kind for kind, sha in here.items() if made.get(kind, sha) != sha]:
            again = commands.maker("heads", value["heads"].provenance.model)
            warnings.append(f"What heads do was told from another {' and other '.join(other)} than shown here; `{again}` makes it again.")
    if "circuit" in value:
        # a circuit that was calibrated after it was evaluated is still the same circuit
        circuit_hashes = (sources["circuit"].sha256, value["circuit"].provenance.parents.get("circuit"))
        tried = value["validation"].provenance.parents.get("circuit") if "validation" in value else None
        if tried and tried not in circuit_hashes:
            warnings.append(f"The validation tried another circuit ({tried[:12]}) than the one shown here ({circuit_hashes[0][:12]}).")
        for kind, what in (
            ("evaluation", "evaluation"),
            ("check", "check of the intensity dial"),
            ("effects", "measurement of the effects"),
        ):
            used = _circuit_of(kind, value[kind]) if kind in value else None
            if used and used not in circuit_hashes:
                warnings.append(f"The {what} used another circuit ({used[:12]}) than the one shown here ({circuit_hashes[0][:12]}).")
    return warnings


def _circuit_of(kind: str, item: Any) -> str | None:
    """The hash of the circuit that something was measured with."""
    if kind == "effects":
        return str(item.circuit_sha256)
    return (item.raw if kind == "evaluation" else item).get("circuit_sha256")
