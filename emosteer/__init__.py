"""emosteer: find emotion circuits in language models and write with them.

    import emosteer
    m = emosteer.load()                                   # the embedded model and its circuit
    print(m.generate("My landlord came by this morning.", emotion="anger").text)

docs/API.md describes every name. Importing this package is instant: what a name needs (torch above all) is imported when the name is used.
"""

from __future__ import annotations

#: typing takes longer to import than this package, and until it is imported nothing guards a command against Ctrl-C.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from emosteer.api.contest import evaluate
    from emosteer.api.describing import describe_heads
    from emosteer.api.effects import effects
    from emosteer.api.loading import load
    from emosteer.api.probing import probe
    from emosteer.api.stages import ablate, assemble, calibrate, extract
    from emosteer.api.steered_model import SteeredModel
    from emosteer.api.validating import validate
    from emosteer.attribution.scores import Scores
    from emosteer.base.errors import EmosteerError
    from emosteer.circuits.circuit import Circuit
    from emosteer.circuits.heads.heads import HeadStudy
    from emosteer.circuits.validation.validation import Validation
    from emosteer.directions.directions import Directions
    from emosteer.generation.decoding import Decoding
    from emosteer.generation.generate import Reply
    from emosteer.judges.registry import make_judge
    from emosteer.models.model import Model
    from emosteer.probing.probes import Probes
    from emosteer.scenarios.scenarios import EMOTIONS
    from emosteer.side_effects.side_effects import SideEffects

__version__ = "0.1.0"

#: Public name -> the module that defines it.
_HOMES = {
    "load": "emosteer.api.loading",
    "SteeredModel": "emosteer.api.steered_model",
    "extract": "emosteer.api.stages",
    "ablate": "emosteer.api.stages",
    "assemble": "emosteer.api.stages",
    "calibrate": "emosteer.api.stages",
    "evaluate": "emosteer.api.contest",
    "probe": "emosteer.api.probing",
    "describe_heads": "emosteer.api.describing",
    "effects": "emosteer.api.effects",
    "validate": "emosteer.api.validating",
    "Model": "emosteer.models.model",
    "Directions": "emosteer.directions.directions",
    "Scores": "emosteer.attribution.scores",
    "Circuit": "emosteer.circuits.circuit",
    "Probes": "emosteer.probing.probes",
    "HeadStudy": "emosteer.circuits.heads.heads",
    "SideEffects": "emosteer.side_effects.side_effects",
    "Validation": "emosteer.circuits.validation.validation",
    "Decoding": "emosteer.generation.decoding",
    "Reply": "emosteer.generation.generate",
    "make_judge": "emosteer.judges.registry",
    "EMOTIONS": "emosteer.scenarios.scenarios",
    "EmosteerError": "emosteer.base.errors",
}

__all__ = [
    "EMOTIONS",
    "Circuit",
    "Decoding",
    "Directions",
    "EmosteerError",
    "HeadStudy",
    "Model",
    "Probes",
    "Reply",
    "Scores",
    "SideEffects",
    "SteeredModel",
    "Validation",
    "__version__",
    "ablate",
    "assemble",
    "calibrate",
    "describe_heads",
    "effects",
    "evaluate",
    "extract",
    "load",
    "make_judge",
    "probe",
    "validate",
]


def __getattr__(name: str) -> object:
    """Imports a public name when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module 'emosteer' has no attribute '{name}'; docs/API.md lists {', '.join(__all__)}")
    from importlib import import_module

    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
