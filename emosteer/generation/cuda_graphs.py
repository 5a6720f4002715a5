"""One step of the lean forward pass recorded as a CUDA graph and replayed, so that the processor starts one piece of work per token
instead of hundreds. Recorded anew when the batch or its cache change size; used only if a replay computes what the step computed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from emosteer.base.progress import note
from emosteer.generation.kv_cache import RowCache
from emosteer.generation.lean_forward import Added, Lean, agree

#: Set to 0 to do without.
SWITCH = "EMOSTEER_GRAPHS"
#: Records what a function does on the device, and returns what does it again on the same tensors.
Recorder = Callable[[Callable[[], None]], Callable[[], None]]


def recorder_for(device: torch.device) -> Recorder | None:
    """How steps are recorded on a device; None where they are not."""
    return partial(_record, device) if device.type == "cuda" and os.environ.get(SWITCH) != "0" else None


def _record(device: torch.device, work: Callable[[], None]) -> Callable[[], None]:
    """Warm-up runs on a stream of their own come first: libraries set themselves up in them, which must not be recorded. All of it on the
    tensors' device, which need not be the current one: of what runs on another device than the stream nothing is recorded."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):  # torch's own stream would be of the first device that was recorded on
            work()
    return graph.replay


class RecordedStep:
    """Replays a step for a batch as long as its slots and the block of its cache stay the same."""

    def __init__(self, lean: Lean, cache: RowCache, tokens: Tensor, positions: Tensor, added: Added, record: Recorder) -> None:
        """tokens, positions: [slot], of the step that was just taken, whose column is the cache's last one; it is only written again."""
        self.cache, self.block = cache, cache.block
        self.tokens, self.positions = tokens.clone(), positions.clone()
        self.column = torch.tensor([cache.end - 1], device=cache.block.device)
        self.mask = cache.whole_mask()
        self.hidden = lean.embed[tokens]

        def work() -> None:
            self.hidden.copy_(lean.fixed_step(self.tokens, self.positions, self.block, self.column, self.mask, added))

        self.replay = record(work)

    @classmethod
    def proved(
        cls, lean: Lean, cache: RowCache, tokens: Tensor, positions: Tensor, added: Added, hidden: Tensor, record: Recorder
    ) -> RecordedStep | None:
        """A recording that computes the final-normed states `hidden` [slot, d_model] of the step that was just taken; else None."""
        try:
            made = cls(lean, cache, tokens, positions, added, record)
            made.hidden.zero_()  # the recording itself has left there what is compared
            made.replay()
        except RuntimeError as error:  # torch's word for whatever cannot be recorded, a lack of memory included
            note(f"a step could not be recorded ({str(error).splitlines()[0]}); going on without. {SWITCH}=0 does so from the start")
            return None
        if agree(made.hidden, hidden):
            return made
        note("a recorded step does not compute what the step computes; going on without")
        return None

    def fits(self) -> bool:
        """Whether the cache is the one that was recorded and has a column left."""
        return self.cache.block is self.block and self.cache.end < self.block.shape[4]

    def step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Final-normed hidden states [slot, d_model] of one more token per slot, valid until the next step."""
        self.cache.advance()
        self.mask[..., self.cache.end - 1] = 0
        self.column.fill_(self.cache.end - 1)
        self.tokens.copy_(tokens)
        self.positions.copy_(positions)
        self.replay()
        return self.hidden
