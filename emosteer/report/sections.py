"""Which figures go where on the page, and what is written where there is nothing to draw."""

from __future__ import annotations

from emosteer.circuits.validation.validation import Validation
from emosteer.probing.probes import Probes
from emosteer.report import (
    circuit_figures,
    contest_figures,
    curve_figures,
    dial_figures,
    direction_figures,
    effect_figures,
    geometry_figures,
    head_pages,
    panel_figures,
    paper_figures,
    probe_figures,
    score_figures,
    validation_figures,
)
from emosteer.report.figures import Figure, Section
from emosteer.report.inputs import Inputs
from emosteer.report.measured import Measured
from emosteer.report.wording import kind_counts, percent, plural
from emosteer.side_effects.side_effects import SideEffects


def sections(inputs: Inputs) -> list[Section]:
    """The page's sections in order; the verdict before them, the replies among them and the provenance after them are the template's."""
    return [
        _contest(inputs),
        _parts(inputs),
        _panel(inputs),
        _topic(inputs),
        _dial(inputs),
        _replies(inputs),
        _directions(inputs),
        _units(inputs),
        _cause(inputs),
        _circuit(inputs),
        *([_validation(inputs.validation)] if inputs.validation is not None else []),
        paper_figures.section(inputs),
        *([head_pages.section(inputs.heads)] if inputs.heads is not None else []),
        *([_probes(inputs.probes)] if inputs.probes is not None else []),
        *([_effects(inputs.effects)] if inputs.effects is not None else []),
    ]


def _contest(inputs: Inputs) -> Section:
    title = "The contest"
    if inputs.contest is None:
        return Section("contest", title, absent=inputs.lacks("evaluation"))
    contest = inputs.contest
    drawn: list[Figure | None] = [
        contest_figures.outcome(contest),
        contest_figures.frontier(contest) if contest.frontier() else None,
        contest_figures.differences(contest),
    ]
    tables = [contest_figures.results_table(contest), contest_figures.equal_table(contest), contest_figures.strength_table(contest)]
    return Section("contest", title, _contest_words(contest), [f for f in drawn if f], [t for t in tables if t])


def _contest_words(contest: Measured) -> str:
    n, kinds = contest.size("test"), kind_counts((contest.raw.get("test") or {}).get("kinds"))
    size = f" ({plural(n, 'prompt')}{f': {kinds}' if kinds else ''})" if n else ""
    return (
        "All methods write replies to the same prompts with the same decoding and seeds. Their settings are chosen on a development "
        f"split under one budget; the test split{size} is read once. A panel of judges "
        "reads each reply without knowing what was asked for. A reply is good where the panel reads the wanted emotion, though it could "
        "have said neutral, and the text is sound, answers its prompt and does not name the emotion."
    )


def _parts(inputs: Inputs) -> Section:
    title = "By emotion, kind of prompt and valence"
    contest = inputs.contest
    if contest is None:
        return Section("parts", title, absent=inputs.lacks("evaluation"))
    figures = [contest_figures.by_part(contest, "by_emotion", "emotion")] if contest.parts("by_emotion") else []
    figures += [contest_figures.by_kind(contest)] if contest.parts("by_kind") else []
    figures += [contest_figures.by_part(contest, "by_valence", "valence")] if contest.parts("by_valence") else []
    if any(row.get("confusion") for row in contest.results.values()):
        figures.append(contest_figures.confusion(contest))
    return Section("parts", title, "", figures)


def _panel(inputs: Inputs) -> Section:
    title, contest = "The panel of judges", inputs.contest
    lost = [*inputs.lacks("evaluation"), *inputs.lacks("replies")]
    if contest is None:
        return Section("panel", title, absent=lost)
    names = (contest.raw.get("judge") or {}).get("name")
    intro = (
        f"Several judges that err differently read every reply{f' ({names})' if names else ''}. The panel's reading is the label "
        "whose mean probability over them is the highest, neutral among the labels; where half of them or more said nothing, the reply is "
        "undecided and does not count as one that carries the emotion."
    )
    figure, table = panel_figures.judges(contest), panel_figures.agreement_table(contest)
    return Section("panel", title, intro, [figure] if figure else [], [table] if table else [], absent=lost)


def _topic(inputs: Inputs) -> Section:
    title, contest = "Emotion or topic", inputs.contest
    if contest is None:
        return Section("topic", title, absent=inputs.lacks("evaluation"))
    table, figure = panel_figures.contamination_table(contest), panel_figures.contamination(contest)
    if table is None or figure is None:
        return Section("topic", title, "Not measured: the evaluation has too few prompts to tell topic from emotion.")
    words = panel_figures.main_words_table(contest)
    intro = (
        "Replies that are angry because they are about refunds, and sad because they are about a sickroom, show a script instead of an "
        "emotion. Here the emotion words are taken out, and a word counter guesses the emotion from what is left."
    )
    return Section("topic", title, intro, [figure], [table], [words] if words else [])


def _dial(inputs: Inputs) -> Section:
    fitted = dial_figures.calibration(inputs.circuit) if inputs.circuit is not None else None
    figures = [fitted] if fitted else []
    if inputs.check is not None:
        figures.append(dial_figures.checked(inputs.check))
    intro = (
        "With --intensity, 0 to 100, each emotion gets a strength of its own, fitted so that judged intensity rises evenly and capped "
        "where the text would break."
    )
    lost = inputs.lacks("circuit") or inputs.lacks("calibration") or inputs.lacks("check")
    return Section("dial", "The intensity dial", intro if figures else "", figures, absent=lost)


def _replies(inputs: Inputs) -> Section:
    return Section("replies", "Replies side by side", absent=inputs.lacks("replies"))


def _directions(inputs: Inputs) -> Section:
    title, directions = "The directions", inputs.directions
    if directions is None:
        return Section("directions", title, absent=inputs.lacks("directions"))
    intro = (
        f"Each emotion's direction is the mean difference between replies that express it and the same scenarios' other replies, over "
        f"{plural(directions.n_groups, 'scenario-event')} ({directions.elicitation} elicitation), at every layer."
    )
    figures = [
        *direction_figures.evidence(directions),
        direction_figures.layer_similarity(directions),
        *geometry_figures.figures(directions),
    ]
    notes = [] if directions.evidence else ["No evidence was measured for these directions: too few scenarios were held out."]
    return Section("directions", title, intro, figures, notes=notes)


def _units(inputs: Inputs) -> Section:
    title, scores = "Heads, neurons and sublayers", inputs.scores
    if scores is None:
        absent = inputs.lacks("scores")
        if inputs.circuit is None:
            return Section("units", title, absent=absent)
        drawn = [score_figures.importance(inputs.circuit.importance, inputs.circuit.emotions, "circuit")]
        return Section("units", title, "", drawn, absent=absent)
    has_neurons = any(form.neurons.numel() for form in scores.forms.values())
    figures = [
        score_figures.head_map(scores, inputs.circuit),
        *([score_figures.neuron_map(scores, inputs.circuit)] if has_neurons else []),
        score_figures.importance(scores.importance, scores.emotions, "scores"),
    ]
    checks = score_figures.checks(scores)
    notes = [] if has_neurons else ["This model has no neurons to score: its MLPs are mixtures of experts."]
    return Section("units", title, "", figures, notes=notes, after=[checks] if checks else [])


def _cause(inputs: Inputs) -> Section:
    title, scores = "Ablation and enhancement", inputs.scores
    if scores is None or not scores.curves:
        return Section("cause", title, absent=inputs.lacks("scores") or inputs.lacks("curves"))
    return Section("cause", title, "", [curve_figures.curves(scores.curves)])


def _circuit(inputs: Inputs) -> Section:
    title, circuit = "The circuit", inputs.circuit
    if circuit is None:
        return Section("circuit", title, absent=inputs.lacks("circuit"))
    heads = [int(circuit.heads[e].sum()) for e in range(len(circuit.emotions))]
    total, neurons = circuit.heads[0].numel(), len(circuit.neuron_index)
    size = f"{min(heads)}" if min(heads) == max(heads) else f"{min(heads)} to {max(heads)}"
    intro = (
        f"{size} of {total} heads for each emotion ({percent(max(heads) / total, 0)}{'' if min(heads) == max(heads) else ' at most'}) and "
        f"{plural(neurons, 'neuron') if neurons else 'no neurons'}{' in all' if neurons else ''}. Made as: {circuit.provenance.method}."
    )
    table = circuit_figures.faithfulness(circuit)
    figures = [circuit_figures.drawn(circuit), circuit_figures.shared(circuit, inputs.directions)]
    return Section("circuit", title, intro, figures, [table] if table else [])


def _validation(found: Validation) -> Section:
    """Only on the page where somebody tried the circuit."""
    intro = (
        f"The model is asked for an emotion in {plural(len(found.prompts), 'prompt')}. Units are replaced where it writes, and the reply "
        "in that emotion should lose what sets it apart from the replies in others; random sets with as many units in every layer stand "
        "beside each figure. Intervals are 95\u202f% over prompts and random sets."
    )
    return Section("validation", "Is it a circuit?", intro, after=validation_figures.tables(found), notes=list(found.notes))


def _probes(probes: Probes) -> Section:
    """Only on the page where somebody probed: no other stage needs it."""
    intro = (
        f"Probes are fitted to the model's states of {plural(probes.texts['train'], 'labelled text')} in the user's turn "
        f"({', '.join(probes.labels)}), their penalty by cross-validation, and tested on others; the same with shuffled labels shows "
        "what is read off nothing."
    )
    table = probe_figures.prompting_table(probes)
    return Section("probes", "Probes", intro, probe_figures.figures(probes), [table] if table else [], notes=list(probes.notes))


def _effects(found: SideEffects) -> Section:
    """Only on the page where somebody measured them."""
    plain = found.unsteered["figures"]
    parts = {
        "right": ("item", "items"),
        "refused": ("harmful request", "harmful requests"),
        "joins": ("prompt that seeks attachment", "prompts that seek attachment"),
        "nll": ("neutral text", "neutral texts"),
    }
    sizes = ", ".join(plural(plain[name]["n"], *words) for name, words in parts.items() if name in plain)
    intro = (
        f"What steering, prompts and sentences do besides ({sizes}): every reply is checked by lists that stand in the package, and "
        "compared with the unsteered model's to the same prompt."
    )
    return Section("effects", "Side effects", intro, effect_figures.figures(found), effect_figures.tables(found), notes=list(found.notes))
