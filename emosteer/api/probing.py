"""`probe` as a function. No torch at import."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from emosteer.api.inputs import PathLike, moving_circuit, path_of, plain_model
from emosteer.circuits.places import ARTIFACTS
from emosteer.probing.settings import ProbeSettings
from emosteer.probing.texts import texts_of

if TYPE_CHECKING:
    from emosteer.api.options import ProbeOptions
    from emosteer.api.steered_model import SteeredModel
    from emosteer.models.model import Model
    from emosteer.probing.probes import Probes


def probe(
    model: Model | SteeredModel,
    texts: PathLike | None = None,
    *,
    circuit: PathLike | None = None,
    scenarios: PathLike | None = None,
    replies: PathLike | None = None,
    partial: PathLike | None = None,
    fresh: bool = False,
    artifacts: PathLike = ARTIFACTS,
    **settings: Unpack[ProbeOptions],
) -> Probes:
    """Fits probes to a model's states of labelled texts, and measures what they read, for how long, and what moves them.

    Args:
        texts: JSON-lines file with "text" and "label" (or "labels", of which lines with one count); the replies of a bank by default.
        circuit: file of what steers for the malleability; the model's own in `artifacts`, else the shipped one, by default.
        scenarios: SEV file; replies: bank, where no texts are given.
        partial: folder that progress is kept in, so that the same call goes on; None keeps nothing. fresh: start over.
        settings: fields of `probing.settings.ProbeSettings`.

    Raises:
        UsageError, DataError: if the texts or a setting make no sense. ArtifactError: for a circuit of another model.
    """
    from emosteer.base.files import sha256_file
    from emosteer.probing import probe as stage
    from emosteer.probing.malleability import Steering

    bare = plain_model(model)
    lists: dict[str, Any] = {name: tuple(value) if isinstance(value, (list, tuple)) else value for name, value in settings.items()}
    chosen = ProbeSettings(**lists)
    data = texts_of(path_of(texts), path_of(scenarios), path_of(replies), chosen)
    found = moving_circuit(bare, circuit, chosen, Path(artifacts))
    steering, parents = None, {}
    if found is not None:
        made, file = found
        vectors = {site: values * made.strength[:, None] for site, values in made.steering(bare).items()}
        steering, parents = Steering(tuple(made.emotions), vectors), {"circuit": sha256_file(file)}
    with tempfile.TemporaryDirectory() as folder:
        return stage.probe(bare, data, chosen, path_of(partial) or Path(folder), steering=steering, parents=parents, fresh=fresh)
