"""Steered replies with repeng: a ControlModel around the Hugging Face model, a vector on every layer of the task."""

import numpy as np
from common import load, serve, task, writer
from repeng import ControlModel, ControlVector

wanted = task()
model = load(wanted)
plain = writer(wanted, model)()
directions = {layer: np.array(vector, dtype=np.float32) for layer, vector in wanted["vectors"].items()}
control = ControlModel(model, list(directions))
control.set_control(ControlVector(model_type=model.config.model_type, directions=directions), 1.0)
serve(writer(wanted, control), plain)
