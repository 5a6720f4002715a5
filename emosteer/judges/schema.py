"""What a judges' file must hold to be taken."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from emosteer.base import schema
from emosteer.base.artifacts import Artifact
from emosteer.base.schema import Fields, Names, Text

_Name = Annotated[str, Field(pattern=r"^[a-z][\w-]{0,60}$")]


class JudgeFields(Fields):
    """The plain fields of a judges' file; files of earlier versions hold heads alone."""

    labels: dict[_Name, Names]
    adapters: dict[_Name, Names] = {}
    encoder: Text
    card: dict[str, Any] = {}


def check(found: Artifact) -> JudgeFields:
    """Refuses a file whose heads and adapters are not what they must be, or do not fit their labels.

    Raises:
        ArtifactError: naming file, field, what was expected and what was found.
    """
    path = found.path
    fields = schema.check_fields(JudgeFields, found.fields, path)
    wanted, sizes = dict[str, str](), dict[str, int]()
    for name, labels in fields.labels.items():
        sizes[f"{name}.labels"] = len(labels)
        for part, dimensions in {"mean": "{0}.in", "scale": "{0}.in", "weight": "{0}.labels {0}.in", "bias": "{0}.labels"}.items():
            wanted[f"{name}.{part}"] = f"float {dimensions.format(name)}"
    for name, labels in fields.adapters.items():
        sizes[f"{name}:labels"] = len(labels)
        wanted |= {f"{name}:weight": f"float {name}:labels {name}:in", f"{name}:bias": f"float {name}:labels"}
        for key in found.tensors:
            side, _, place = key.removeprefix(f"{name}:").partition(".")
            if key.startswith(f"{name}:") and side in ("down", "up"):
                wanted |= {f"{name}:down.{place}": f"float {name}:{place}:rank {name}:{place}:in"}
                wanted |= {f"{name}:up.{place}": f"float {name}:{place}:out {name}:{place}:rank"}
    schema.check_tensors(found.tensors, wanted, sizes, path)
    return fields
