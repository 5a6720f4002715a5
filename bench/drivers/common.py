"""Both drivers load the plain model, answer "go" lines with one JSON line each. Runs in a rival's environment, without emosteer."""

import json
import sys
import time

import torch
from transformers import AutoModelForCausalLM


def load(task):
    """The plain Hugging Face model of the task."""
    torch.set_num_threads(task["threads"])
    dtype = getattr(torch, task["dtype"])
    model = AutoModelForCausalLM.from_pretrained(task["model"], dtype=dtype, local_files_only=True, attn_implementation="sdpa")
    model.eval().requires_grad_(False)
    model.generation_config.eos_token_id = None  # replies of full length
    return model


def writer(task, model):
    """A function that writes the task's batch and returns the new tokens [row, pos]."""
    width = max(map(len, task["prompts"]))
    ids = torch.tensor([[task["pad"]] * (width - len(p)) + p for p in task["prompts"]])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in task["prompts"]])

    def write():
        with torch.no_grad():
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=task["new_tokens"],
                do_sample=False,
                repetition_penalty=1.1,
                pad_token_id=task["pad"],
            )
        return out[:, width:]

    return write


def task():
    """The task named on the command line; layer numbers as integers."""
    with open(sys.argv[1], encoding="utf-8") as file:
        found = json.load(file)
    found["vectors"] = {int(layer): vector for layer, vector in found["vectors"].items()}
    return found


def serve(write, plain):
    """Says that it is ready, then writes the batch once for every line. plain: the unsteered replies, which steering must change."""
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        out = write()
        seconds = time.perf_counter() - start
        changed = int((out != plain).any(1).sum())
        print(json.dumps({"seconds": seconds, "tokens": out.numel(), "changed": changed}), flush=True)
