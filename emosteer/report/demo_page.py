"""The page of `make demo`: replies side by side and the circuit drawn, in one file that loads nothing."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from emosteer import __version__
from emosteer.circuits.circuit import Circuit
from emosteer.judges.pairs import Pair, tally
from emosteer.report.circuit_figures import drawn
from emosteer.report.page import digests, environment, stylesheet
from emosteer.report.replies import clean


def demo_page(pairs: Sequence[Pair], circuit: Circuit, facts: Sequence[str]) -> str:
    """The page's text.

    Args:
        facts: what else is worth a line each, such as how the prompts were drawn and what the extraction found.
    """
    style = stylesheet()
    text = (
        environment()
        .get_template("demo.html")
        .render(
            pairs=pairs,
            unsteered=tally(pairs, plain=True),
            steered=tally(pairs),
            figure=drawn(circuit),
            model=circuit.provenance.model,
            facts=facts,
            version=__version__,
            style=Markup(style),
            **digests(style=style),
        )
    )
    return clean(text)
