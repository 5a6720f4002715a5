"""The table of the paper's figures: what it quotes, what it measures beside, and what it says where something is missing."""

from __future__ import annotations

from dataclasses import replace

from emosteer.report.figures import Absent
from emosteer.report.inputs import WHAT, read_inputs
from emosteer.report.paper_figures import section
from tests.helpers.report_setup import TRUTH, whole_page


def test_every_figure_of_the_paper_stands_beside_ours() -> None:
    inputs = read_inputs(whole_page()[0])
    (table,) = section(inputs).tables
    rows = {str(row[0]): [str(cell).replace("\u202f", " ") for cell in row[1:]] for row in table.rows}
    assert list(rows)[:6] == [
        *("Direction similarity (cosine)", "Head importance", "Neuron importance", "Sublayer importance", "Ablation curves"),
        "Enhancement curves",
    ]
    figures = [rows[f"{name}: replies that express it"][0] for name in ("Prompting", "Residual steering", "Circuit")]
    assert figures == ["98.96 %", "91.22 %", "99.65 %"]
    good = rows["Circuit: replies that express it"]
    assert f"good {100 * TRUTH['circuit'][0]:.1f}"[:7] in good[1] and f"good {100 * TRUTH['random-circuit'][0]:.1f}" in good[2]
    assert rows["Circuit composition"][0] == "392 neurons (0.17 %) and 168 heads (25 %)"
    assert [row[1] for row in table.rows if row[0] == "Replies that name the emotion"] == ["4.3 %", "29.8 % (steered)"]
    # from 0.8 when asked, 0.2 less at a share of .25 for the best heads; random sets between -.1 and 0 beside it
    assert rows["Ablation curves"][1].startswith("score 0.8") and "25 %" in rows["Ablation curves"][1]
    assert not section(inputs).notes


def test_the_model_is_said_to_be_another_unless_it_is_the_papers() -> None:
    inputs = read_inputs(whole_page()[0])
    assert "another model, toy/model-1" in section(inputs).intro
    assert "its own model" in section(replace(inputs, model="meta-llama/Llama-3.2-3B-Instruct")).intro


def test_what_its_missing_rows_need_is_named() -> None:
    inputs = read_inputs(whole_page()[0])
    less = replace(inputs, contest=None, scores=None, absent=[Absent(WHAT[name], "") for name in ("evaluation", "scores")])
    found = section(less)
    assert "the evaluation" in found.notes[0] and "scores" in found.notes[0]
    assert [row[0] for row in found.tables[0].rows] == ["Direction similarity (cosine)", "Circuit composition", "Residual steering"]
    none = section(replace(less, directions=None, circuit=None))
    assert not none.tables and "98.96" not in none.intro
