"""docs/FAMILIES.md, made from the architecture table and the random models of the tests: `make families`, or `python -m tests.families`.

`tests/models/test_families.py` fails while the page is not what this makes.
"""

from __future__ import annotations

from pathlib import Path

from emosteer.api.support import Support, support
from emosteer.base.files import write_text
from emosteer.models.model import Model
from tests.helpers.families import MODELS, random_model

PAGE = Path(__file__).parents[1] / "docs" / "FAMILIES.md"
#: What is made of the page lies between these two lines.
BEGIN, END = "<!-- made by", "<!-- end -->"


def page() -> str:
    """The whole page: the table new, the rest as it is."""
    head, rest = PAGE.read_text("utf-8").split(BEGIN, 1)
    line, rest = rest.split("\n", 1)
    return f"{head}{BEGIN}{line}\n\n{table()}\n\n{END}{rest.split(END, 1)[1]}"


def table() -> str:
    """A row for every model, a column for every stage, and notes on what limits a yes."""
    models = {name: random_model(name) for name in MODELS}
    found = {name: support(model) for name, model in models.items()}
    stages = list(next(iter(found.values())))
    notes: list[str] = []
    rows = [["models", "class", "row", "blocks", *stages], ["---"] * (4 + len(stages))]
    for name, case in MODELS.items():
        cells = [_cell(found[name][stage], notes) for stage in stages]
        rows.append([case.known_as, f"`{type(models[name].hf).__name__}`", case.row, blocks(models[name]), *cells])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*lines, "", *(f"{number}. {note}" for number, note in enumerate(notes, 1))])


def _cell(stage: Support, notes: list[str]) -> str:
    """Yes or no, with the numbers of what limits a yes; notes that are new are added."""
    if not stage.works:
        return "no"
    notes += [note for note in stage.notes if note not in notes]
    return " ".join(["yes", *(f"({notes.index(note) + 1})" for note in stage.notes)])


def blocks(model: Model) -> str:
    """How layers are built, in a few words."""
    family = model.family
    words = ["parallel"] * bool(family.parallel)
    words += ["norms after sublayers only" if not family.pre_norms else "norms before and after sublayers"] * family.post_norms
    words += ["factors"] * (family.residual_factor is not None) + ["experts"] * (not family.has_neurons)
    return ", ".join(words + ["learned positions"] * (family.rotary is None)) or "in turn"


if __name__ == "__main__":
    write_text(PAGE, page())
    print(f"wrote {PAGE}")
