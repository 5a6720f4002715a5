"""Steered replies with steering-vectors: forward hooks on the Hugging Face model's decoder blocks, a vector on every layer of the task."""

import torch
from common import load, serve, task, writer
from steering_vectors import SteeringVector

wanted = task()
model = load(wanted)
plain = writer(wanted, model)()
activations = {layer: torch.tensor(vector, dtype=model.dtype) for layer, vector in wanted["vectors"].items()}
with SteeringVector(activations, "decoder_block").apply(model):
    serve(writer(wanted, model), plain)
