"""Artefacts -> plain summaries (JSON) and tables for people. Loads no model; what is printed is what `--json` gives."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from emosteer.attribution.scores import Scores
from emosteer.attribution.unit_scores import top_units
from emosteer.base.artifacts import Artifact
from emosteer.base.tables import print_table
from emosteer.circuits.circuit import Circuit
from emosteer.circuits.dial import strength_for
from emosteer.circuits.heads.heads import HeadStudy
from emosteer.circuits.methods import METHODS
from emosteer.circuits.validation.validation import Validation
from emosteer.cli.print_effects import effects_summary, print_effects
from emosteer.cli.print_heads import heads_summary, print_heads
from emosteer.cli.print_probes import print_probes, probes_summary
from emosteer.cli.print_validation import print_validation, validation_summary
from emosteer.directions.directions import Directions
from emosteer.models.sites import RESID_POST, Head, Neuron
from emosteer.probing.probes import Probes
from emosteer.report.commands import made_by
from emosteer.side_effects.side_effects import SideEffects

Summary = dict[str, Any]


# ---- directions ----------------------------------------------------------------------------------------------------


def directions_summary(found: Directions) -> Summary:
    """What was extracted, and per layer the evidence with its controls."""
    layers = []
    for index, site in enumerate(found.sites):
        if site.kind != RESID_POST:
            continue
        row: Summary = {"layer": site.layer, "norm": _mean(found.norms[:, index])}
        if found.evidence:
            e = found.evidence
            row |= {
                "accuracy": _mean(e.accuracy[index]),
                "accuracy_shuffled": _mean(e.accuracy_shuffled[index]),
                "halves": _mean(e.halves[:, index]),
                "halves_shuffled": _mean(e.halves_shuffled[:, index]),
                **{name: _mean(e.across[name][:, index]) if name in e.across else None for name in ("themes", "valences")},
                "by_emotion": dict(zip(found.emotions, _rounded(e.accuracy[index]), strict=True)),
            }
        layers.append(row)
    return {
        "model": found.provenance.model,
        "emotions": list(found.emotions),
        "elicitation": found.elicitation,
        "groups": found.n_groups,
        "heldout": found.n_heldout,
        "dropped": dict(found.dropped),
        "incomplete": found.incomplete,
        "replies": dict(found.replies),
        "chance": 1 / len(found.emotions),
        "layers": layers,
    }


def print_directions(summary: Summary) -> None:
    """The table of `extract`."""
    print(f"{summary['model']}: {summary['groups']} groups, {summary['elicitation']} elicitation -> {summary['file']}")
    if summary["dropped"]:
        print("dropped:", ", ".join(f"{count} ({why})" for why, count in summary["dropped"].items()))
    print_replies(summary)
    layers = summary["layers"]
    if "accuracy" not in layers[0]:
        print("no evidence was measured: too few scenarios are held out (--holdout)")
        return
    print(
        f"held-out groups: {summary['heldout']}; naming the emotion from the projections of its contrast (chance {summary['chance']:.3f});"
    )
    parts = [name for name in ("themes", "valences") if layers[0][name] is not None]
    print(" and ".join(["cosines between directions of disjoint halves", *(f"of pairs of {name}" for name in parts)]))
    names = ("layer", "accuracy", "accuracy_shuffled", "halves", "halves_shuffled", *parts)
    step = max(1, len(layers) // 10)
    shown = [row for row in layers if row["layer"] % step == 0 or row is layers[-1]]
    heads = ("layer", "accuracy", "(shuffled)", "halves", "(shuffled)", *parts, "by emotion")
    print_table(heads, [[*(row[name] for name in names), _pairs(row["by_emotion"])] for row in shown])


def print_replies(summary: Summary) -> None:
    """What incomplete groups hold: how many lack an emotion, and how many replies each emotion has."""
    if summary.get("incomplete"):
        counts = ", ".join(f"{emotion} {count}" for emotion, count in summary["replies"].items())
        print(f"{summary['incomplete']} of {summary['groups']} groups lack an emotion; replies: {counts}")


# ---- scores --------------------------------------------------------------------------------------------------------


def scores_summary(found: Scores, top: int = 5) -> Summary:
    """Best units per emotion, the checks, the curves and sublayer importance."""
    best: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for e, emotion in enumerate(found.emotions):
        best[emotion] = {}
        for form, scores in found.forms.items():
            best[emotion][form] = {
                "heads": {str(unit): round(scores.of(e, unit), 6) for unit in top_units(scores.heads[e], top, Head)},
                "neurons": {str(unit): round(scores.of(e, unit), 6) for unit in top_units(scores.neurons[e], top, Neuron)},
            }
    return {
        "model": found.provenance.model,
        "emotions": list(found.emotions),
        "band": list(found.band),
        "top": best,
        "verification": dict(found.verification),
        "patches": dict(found.patches),
        "curves": curve_table(found.curves),
        "curve_rows": [dict(row) for row in found.curves],
        "importance": {
            e: {"attention": _rounded(found.importance[i, :, 0]), "mlp": _rounded(found.importance[i, :, 1])}
            for i, e in enumerate(found.emotions)
        },
    }


def curve_table(rows: Sequence[Mapping[str, Any]]) -> list[Summary]:
    """Curve rows averaged over emotions: one line per kind, unit kind and share, the top set beside its random controls."""
    means: dict[tuple[str, str, float], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        means[row["kind"], row["unit"], row["share"]][row["who"]].append(row["score"])
    table: list[Summary] = []
    for (kind, unit, share), who in means.items():
        scores = {name: sum(values) / len(values) for name, values in who.items()}
        random = [value for name, value in scores.items() if name.startswith("random")]
        for name in ("asked", "plain"):
            if name in scores:
                table.append({"kind": f"none ({name})", "unit": "", "share": 0.0, "top": scores[name]})
        if "top" in scores:
            mean = sum(random) / len(random) if random else None
            spread = (sum((r - mean) ** 2 for r in random) / (len(random) - 1)) ** 0.5 if mean is not None and len(random) > 1 else None
            line = {
                "kind": kind,
                "unit": unit,
                "share": share,
                "top": scores["top"],
                "random_mean": mean,
                "random_sd": spread,
                "randoms": len(random),
            }
            table.append(line)
    return table


def print_scores(summary: Summary) -> None:
    """The tables of `ablate`."""
    print(f"{summary['model']}: scores of every head and neuron -> {summary['file']}")
    forms = list(next(iter(summary["top"].values())))
    for kind in ("heads", "neurons"):
        rows = [(emotion, *(" ".join(found[form][kind]) for form in forms)) for emotion, found in summary["top"].items()]
        print_table(("emotion", *(f"best {kind} ({form})" for form in forms)), rows)
    print("sublayer importance, the three highest: change of the final score per unit of dose along the direction")
    rows = [(emotion, *(_highest(found[kind]) for kind in ("attention", "mlp"))) for emotion, found in summary["importance"].items()]
    print_table(("emotion", "attention", "MLP"), rows)
    for kind in ("heads", "neurons"):
        if kind in summary["verification"]:
            v = summary["verification"][kind]
            print(
                f"one-pass contribution against real ablation, {v['units']} {kind}, {summary['verification']['prompts']} prompts: "
                f"relative error median {v['median_relative_error']:.1e}, up to 1e-4 in {v['share_within_1e-4']:.1%}, "
                f"largest {v['max_relative_error']:.1e} (contributions near zero); "
                f"at most {v['max_error_to_largest']:.1e} of the largest drop"
            )
    if "skipped" in summary["verification"]:
        print(f"one-pass check left out: {summary['verification']['skipped']}")
    if summary["patches"]:
        p = summary["patches"]
        print_replies(p.get("patched", {}))
        print(
            f"attribution patching against {len(p['units'])} true patches ({p['emotion']}): correlation {p['correlation']:.3f}, "
            f"on random units alone {p['correlation_random']:.3f}"
        )
    if summary["curves"]:
        print("emotion score of the text (bank replies 1, no emotion about 0), mean over emotions")
        cell = lambda value: "" if value is None else value  # noqa: E731
        names = ("kind", "unit", "share", "top", "random_mean", "random_sd")
        print_table(
            ("kind", "units", "share", "top", "random", "sd"), [[cell(row.get(name)) for name in names] for row in summary["curves"]]
        )


# ---- circuits ------------------------------------------------------------------------------------------------------


def circuit_summary(found: Circuit) -> Summary:
    """Size, faithfulness with its random control, strengths and overlap."""
    return {
        "model": found.provenance.model,
        "preset": found.preset,
        "method": found.provenance.method,
        "strength": dict(zip(found.emotions, _rounded(found.strength), strict=True)),
        "residual_strength": found.residual_strength,
        "residual_layers": list(found.residual_layers),
        "examples": {emotion: len(found.examples.get(emotion, ())) for emotion in found.emotions},
        "learned_residual": None,  # unless the metrics tell of some
        **{key: value for key, value in found.metrics.items()},
    }


def _shown(examples: Mapping[str, int]) -> str:
    """How many examples stand before a prompt that is steered."""
    counts = {count: [emotion for emotion, own in examples.items() if own == count] for count in sorted({*examples.values()}, reverse=True)}
    told = ", ".join(f"{count or 'none'}" + (f" for {', '.join(some)}" if len(counts) > 1 else "") for count, some in counts.items())
    return f"examples before every prompt that is steered: {told}"


def print_circuit(summary: Summary) -> None:
    """The tables of `circuit`."""
    print(f"{summary['model']}: {summary['method']} -> {summary['file']}")
    names = ("heads", "neurons", "faithfulness", "left", "without_weakest", "random_mean", "random_max")
    measured, overlap = summary.get("emotions", {}), summary.get("overlap", {})
    if measured:
        rows = [(emotion, *(row[name] for name in names), summary["strength"][emotion]) for emotion, row in measured.items()]
        print("shares of the effect of all heads (and neurons, if it has any): the circuit, everything else, random circuits")
        print_table(("emotion", "heads", "neurons", "circuit", "left", "no weakest", "random", "(max)", "strength"), rows)
    if overlap:
        print("overlap of units (Jaccard)")
        print_table(("", *overlap), [(a, *(overlap[a][b] for b in overlap)) for a in overlap])
    print_replies(summary.get("gains", {}).get("learned_from", {}))
    print(_learned(summary))
    print(_shown(summary["examples"]))
    if "tuning" in summary:
        tuning = summary["tuning"]
        print(f"strength tuned on training prompts, {tuning['rule']}; nats per token of the replies alone:")
        for method in (name for name in METHODS if name in tuning):
            print(f"  {method}: " + ", ".join(f"{strength} -> {cost:.2f}" for strength, cost in tuning[method].items()))
    if "calibration" in summary:
        print_calibration(summary["calibration"])


def _learned(summary: Summary) -> str:
    """Whether residual vectors were learned for the contest, and how far."""
    record = summary["learned_residual"]
    if record is None:
        return "learned residual vectors: none (`emosteer circuit --learn-residual` makes a circuit that has them)"
    margins = "".join(f", {margin[0]:.2f} -> {margin[-1]:.2f}" for margin in [record["margin"]] if margin)
    return f"learned residual vectors: {len(record['margin'])} steps{margins} nats per token between the wanted and the other replies"


def print_calibration(table: Mapping[str, Any]) -> None:
    """The dial of a calibrated circuit: strengths, and what was measured on the prompts it was fitted on."""
    usual = table["default_intensity"]
    default = "where most replies are good" if usual is None else f"those of {usual:g}"
    print(f"intensity dial, {table['groups']} prompts, judge {table['judge']}; default strengths are {default}")
    print(f"  {table['rule']}")
    rows = []
    for emotion, curve in table["emotions"].items():
        end = curve["fitted"].index(curve["fitted"][-1]) or -1  # where 100 is: the first of the highest, the cap where nothing rises
        marks = (25, 50, 75, 100) if len(curve["strength"]) > 1 else ()
        dial: list[object] = [strength_for(curve["strength"], curve["fitted"], mark) for mark in marks] or ["none"] * 4
        measured = (curve[name][end] for name in ("ratio", "sound", "names"))
        rows.append((emotion, *dial, curve["strength"][-1], curve["fitted"][0], curve["fitted"][-1], *measured))
    heads = ("strength at 25", "50", "75", "100", "cap", "judged at 0", "at 100", "ratio at 100", "sound", "names")
    print_table(("emotion", *heads), rows)
    if "joint_ratio" in table:
        print(f"ratio at the caps, all emotions together: {table['joint_ratio']:.3f}")


def print_calibration_check(result: Mapping[str, Any]) -> None:
    """The table of `calibrate --check`."""
    test = result["test"]
    kinds = ", ".join(f"{kind} {n}" for kind, n in test["kinds"].items())
    print(f"{result['model']}: the dial of {result['circuit']} on {test['n_groups']} prompts ({kinds}) -> {result['file']}")
    names = ("intensity", "strength", "judged", "error", "ratio", "sound", "names", "n")
    rows = [(e, *(row[name][i] for name in names)) for e, row in result["emotions"].items() for i in range(len(row["strength"]))]
    print_table(("emotion", *names), rows)
    for emotion, row in result["emotions"].items():
        rises = ", ".join(
            f"{rise:+.3f}" + ("" if e is None else f" ({e:.3f})") for rise, e in zip(row["rise"], row["rise_error"], strict=True)
        )
        print(f"{emotion}: {'rises throughout' if row['monotone'] else 'NOT monotone'}; steps with their standard errors: {rises}")
    joint = ", ".join("-" if ratio is None else f"{ratio:.3f}" for ratio in result["joint_ratio"])
    print(f"ratio, all emotions together, from the lowest intensity to the highest: {joint}")
    if result["without_dial"]:
        print(f"without a dial: {', '.join(result['without_dial'])}")


# ---- any artefact --------------------------------------------------------------------------------------------------


#: Kind -> how an artefact becomes a value, the value a summary, and the summary a print.
_KINDS: dict[str, tuple[Callable[[Artifact], Any], Callable[[Any], Summary], Callable[[Summary], None]]] = {
    "directions": (Directions.from_artifact, directions_summary, print_directions),
    "circuit": (Circuit.from_artifact, circuit_summary, print_circuit),
    "scores": (Scores.from_artifact, scores_summary, print_scores),
    "probes": (Probes.from_artifact, probes_summary, print_probes),
    "heads": (HeadStudy.from_artifact, heads_summary, print_heads),
    "effects": (SideEffects.from_artifact, effects_summary, print_effects),
    "validation": (Validation.from_artifact, validation_summary, print_validation),
}


def artifact_summary(found: Artifact) -> Summary:
    """Kind, provenance, tensors, the kind's own summary, and the command that makes it again, kept or rebuilt from the record."""
    p = found.provenance
    summary: Summary = {
        "file": str(found.path),
        "kind": found.kind,
        "sha256": found.sha256,
        "provenance": p.record(),
        "tensors": {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in found.tensors.items()},
    }
    if found.kind not in _KINDS:
        return summary
    made_from, summary_of, _ = _KINDS[found.kind]
    value = made_from(found)
    summary["content"] = summary_of(value)
    return {**summary, "command": made_by(found.kind, value, p.model)}


def print_artifact(summary: Summary) -> None:
    """The text of `inspect`."""
    p = summary["provenance"]
    print(f"{summary['file']}: {summary['kind']} artefact, sha256 {summary['sha256'][:16]}")
    lines = [
        ("method", p["method"]),
        ("model", f"{p['model']} (weights {p['model_sha256'][:16]})"),
        ("chat template", p["template_sha256"][:16]),
        ("data", ", ".join(f"{name} {sha[:12]}" for name, sha in p["data"].items())),
        ("seed", p["seed"]),
        ("parents", ", ".join(f"{name} {sha[:12]}" for name, sha in p["parents"].items())),
        ("versions", ", ".join(f"{name} {version}" for name, version in p["versions"].items())),
        *([("command", summary["command"])] if "command" in summary else []),
        ("parameters", ", ".join(f"{k}={v}" for k, v in p["params"].items() if not isinstance(v, dict))),
    ]
    print_table(("provenance", ""), lines)
    if summary["kind"] in _KINDS:
        _KINDS[summary["kind"]][2]({"file": summary["file"], **summary["content"]})
    print_table(("tensor", "dtype", "shape"), [(name, dtype, shape) for name, (dtype, shape) in summary["tensors"].items()])


def _highest(values: Sequence[float], count: int = 3) -> str:
    order = sorted(range(len(values)), key=lambda layer: -values[layer])[:count]
    return " ".join(f"L{layer} {values[layer]:.2f}" for layer in order)


def _mean(values: Tensor) -> float:
    return round(values.float().mean().item(), 6)


def _rounded(values: Tensor) -> list[float]:
    return [round(float(v), 6) for v in values.tolist()]


def _pairs(values: Mapping[str, float]) -> str:
    return " ".join(f"{name[:3]} {value:.2f}" for name, value in values.items())
