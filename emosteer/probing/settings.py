"""What shapes a run of `probe`. No torch, so that the command line can show the defaults."""

from __future__ import annotations

from dataclasses import dataclass

from emosteer.base.errors import UsageError, suggest

#: What can be probed: the residual stream after attention and after the MLP, every head's output before W_O, what the MLP writes.
RESID_MID, RESID_POST, HEADS, MLP_OUT = "resid_mid", "resid_post", "heads", "mlp_out"
KINDS = (RESID_MID, RESID_POST, HEADS, MLP_OUT)
#: Which of a text's positions are read: the mean over all, or the last one.
READS = ("mean", "last")
#: Neutral tokens after a text, at most.
MAX_DISTANCE = 1024


@dataclass(frozen=True)
class ProbeSettings:
    """What shapes the result.

    kinds: what is probed; read: "mean" or "last"; per_label: texts of each label, at most; test_share: share of them that nothing is
    chosen or fitted on; folds: of the cross-validation; decays: candidates for the weight of the L2 penalty; hidden: width of the
    non-linear probes, 0 for none; shuffles: probes fitted to shuffled labels; epochs: passes over the states; longest: tokens of a text
    that are read; distances: neutral tokens after a text at which the probe is read again; followed: texts that this is done with, 0
    for none; prompted: test texts that the model is asked about, 0 for none; shots: examples of each label that it is shown; moved:
    texts read under system lines and steering, 0 for none.
    """

    kinds: tuple[str, ...] = (RESID_POST, HEADS, MLP_OUT)
    read: str = "mean"
    per_label: int = 200
    test_share: float = 0.25
    folds: int = 3
    decays: tuple[float, ...] = (0.001, 0.01, 0.1, 1.0)
    hidden: int = 16
    shuffles: int = 3
    epochs: int = 40
    longest: int = 128
    batch_tokens: int = 1024
    distances: tuple[int, ...] = (0, 16, 64, 256, MAX_DISTANCE)
    followed: int = 280
    prompted: int = 140
    shots: int = 1
    moved: int = 35
    seed: int = 0

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in KINDS:
                raise UsageError(f"unknown kind of site '{kind}'{suggest(kind, KINDS)}; expected {', '.join(KINDS)}")
        if not self.kinds or len(set(self.kinds)) < len(self.kinds):
            raise UsageError(f"expected some of {', '.join(KINDS)}, each once, found '{','.join(self.kinds)}'")
        if self.read not in READS:
            raise UsageError(f"unknown reading '{self.read}'{suggest(self.read, READS)}; expected {', '.join(READS)}")
        _within(self.decays, "decays", 0, 1000)
        _within(self.distances, "distances", 0, MAX_DISTANCE)
        if not 0 < self.test_share < 1:
            raise UsageError(f"expected a test share between 0 and 1, found {self.test_share}")
        counts = {"per_label": (4, 1_000_000), "folds": (2, 20), "hidden": (0, 1024), "shuffles": (1, 100), "epochs": (1, 10_000)}
        counts |= {"longest": (1, 100_000), "followed": (0, 100_000), "prompted": (0, 100_000), "shots": (0, 16), "moved": (0, 100_000)}
        for name, (low, high) in counts.items():
            if not low <= (found := getattr(self, name)) <= high:
                raise UsageError(f"expected {name} from {low} to {high}, found {found}")


def _within(values: tuple[float, ...], name: str, low: float, high: float) -> None:
    if not 1 <= len(values) <= 20 or len(set(values)) < len(values) or not all(low <= value <= high for value in values):
        raise UsageError(f"expected {name} to be 1 to 20 different numbers from {low} to {high}, found '{','.join(map(str, values))}'")
