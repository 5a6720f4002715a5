"""How much `validate` measures. No torch, so that the command line can show the defaults."""

from __future__ import annotations

from dataclasses import dataclass

from emosteer.base.errors import UsageError, suggest

#: What takes a unit's place: its neutral mean; its own value in the run of the same text under another emotion's prompt, or under a
#: prompt that asks for neutrality (position by position).
MEAN, RESAMPLE, NEUTRALLY = "mean", "resample", "neutral"
KINDS = (MEAN, RESAMPLE, NEUTRALLY)
#: How the model is made to follow an emotion.
ASKING = ("tone", "system")
#: What can be measured: ablation while an emotion is followed, the circuit alone, ablation while one is read, swaps of heads.
NECESSARY, SUFFICIENT, READ, SWAPS = "necessary", "sufficient", "reading", "swaps"
PARTS = (NECESSARY, SUFFICIENT, READ, SWAPS)
#: Random sets beside the points of dose curves, beside core and own parts, and of those that match in size.
FEW = 5
#: What the claim asks of a circuit: its drop against that of matched random sets, other emotions' drop against its own, emotions.
RATIO, SPECIFIC, ENOUGH = 3.0, 0.5, 4


@dataclass(frozen=True)
class ValidateSettings:
    """How much is measured.

    prompts: of the bank, each asked in every emotion; randoms: random sets beside every point, matched in layer and number; sizes: of the
    circuit's largest units, as shares of all heads; focus: the one of them at which everything is measured, as at the whole circuit;
    doses: of the ablation, beside 0 and 1; kinds: what takes the place of ablated units; held: of all heads outside the circuit, where
    it alone is to carry the emotion; elicitations: how the emotion is asked for; others: replies in other emotions that the wanted one
    is compared with; reply_tokens: of each reply that are scored; references: prompts that neutral means are taken from; bank_groups:
    prompts of the bank that rankings are made from; bootstraps: of those; written: prompts that replies are written to, 0 for none;
    row_tokens: computed at once; parts: what is measured at all.
    """

    prompts: int = 8
    randoms: int = 20
    sizes: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1, 0.25, 0.5)
    focus: float = 0.05
    doses: tuple[float, ...] = (0.25, 0.5, 0.75)
    kinds: tuple[str, ...] = (RESAMPLE, MEAN)
    held: tuple[str, ...] = (MEAN, NEUTRALLY)
    elicitations: tuple[str, ...] = ASKING
    others: int = 2
    reply_tokens: int = 16
    references: int = 16
    bank_groups: int = 96
    bootstraps: int = 200
    written: int = 0
    row_tokens: int = 640
    seed: int = 0
    parts: tuple[str, ...] = PARTS

    def __post_init__(self) -> None:
        for name, known in (("kinds", KINDS), ("held", KINDS), ("elicitations", ASKING), ("parts", PARTS)):
            found = getattr(self, name)
            for value in found:
                if value not in known:
                    raise UsageError(f"unknown {name} '{value}'{suggest(value, known)}; expected {', '.join(known)}")
            if not found or len(set(found)) < len(found):
                raise UsageError(f"expected some of {', '.join(known)} as {name}, each once, found '{','.join(found)}'")
        for name in ("sizes", "doses"):
            values = getattr(self, name)
            if len(values) > 20 or len(set(values)) < len(values) or not all(0 < value <= 1 for value in values):
                raise UsageError(f"expected {name} to be at most 20 different numbers above 0 and up to 1, found '{_shown(values)}'")
        if not 0 < self.focus <= 1:
            raise UsageError(f"expected focus to lie above 0 and up to 1, found {self.focus}")
        bounds = {"prompts": (2, 10_000), "randoms": (2, 1000), "others": (1, 255), "reply_tokens": (1, 10_000), "references": (1, 10_000)}
        bounds |= {"bank_groups": (2, 100_000), "bootstraps": (1, 10_000), "written": (0, 1000), "row_tokens": (1, 10_000_000)}
        for name, (low, high) in bounds.items():
            if not low <= (count := getattr(self, name)) <= high:
                raise UsageError(f"expected {name} from {low} to {high}, found {count}")


#: What `--quick` changes: one size, one way of asking, fewer prompts, and the beginnings of replies.
QUICK = {
    **{
        "prompts": 4,
        "reply_tokens": 12,
        "sizes": (0.05,),
        "doses": (),
        "kinds": (RESAMPLE,),
        "held": (NEUTRALLY,),
        "elicitations": ("tone",),
    },
    **{"bank_groups": 32, "bootstraps": 100},
}


def _shown(values: tuple[float, ...]) -> str:
    return ",".join(f"{value:g}" for value in values)
