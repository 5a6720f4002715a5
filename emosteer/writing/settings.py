"""How replies are written, where it shapes none of them. No torch, so that the command line can show the defaults."""

from __future__ import annotations

#: Replies written at once: by `generate` and `calibrate`, and in the contest, whose batches are of one method each.
BATCH_SIZE, CONTEST_BATCH_SIZE = 32, 64
