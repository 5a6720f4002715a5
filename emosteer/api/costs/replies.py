"""What writing and reading many texts will cost: `generate`, `judge` and `effects`. Counted exactly, timed by a short trial."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from emosteer.api.costs import trials
from emosteer.api.costs.cost import REPLY_BYTES, VERDICT_BYTES, Cost, Part
from emosteer.api.costs.memory import WRITING, needed, peak
from emosteer.api.costs.trials import plus, times
from emosteer.base.jsonl import whole_rows
from emosteer.circuits.circuit import Circuit
from emosteer.circuits.methods import METHODS
from emosteer.directions.activations import TokenRow
from emosteer.generation.decoding import Decoding
from emosteer.judges.protocol import EmotionJudge, Soundness
from emosteer.models.model import Model
from emosteer.models.sites import RESID_POST, Site
from emosteer.scenarios.scenarios import Group
from emosteer.side_effects.battery import Battery, evenly
from emosteer.side_effects.conditions import Condition, conditions_of
from emosteer.side_effects.neutral import BATCH, text_nll
from emosteer.side_effects.outcomes import ASKED, passes
from emosteer.side_effects.settings import SENTENCES, EffectsSettings
from emosteer.writing.jobs import Job, asked_request, job_key
from emosteer.writing.reply_files import refuse_others
from emosteer.writing.writer import Writer

#: Tokens of a long conversation that a trial reads.
TALK = 1024


def of_generate(writer: Writer, jobs: Sequence[Job], out: Path | None = None, circuit_sha256: str = "", fresh: bool = False) -> Cost:
    """Replies to be written to a file, or printed. out: its replies are kept, unless it is to be fresh.

    Raises:
        UsageError: if it holds replies of other settings, as writing would.
    """
    there = set[str]()
    if out is not None and out.is_file() and not fresh:
        rows = whole_rows(out)
        refuse_others(out, rows, writer.run_key(circuit_sha256))
        there = {job_key(row) for row in rows}
    left = [job for job in jobs if job.key not in there]
    size, longest = min(writer.batch_size, max(1, len(left))), writer.decoding.max_new_tokens
    steers = METHODS[writer.method].steers
    seconds: float | None = 0.0
    if left:
        requests = writer.requests(evenly(left, size))
        circuit = writer.circuit if steers else None
        seconds = trials.writing(writer.model, circuit, requests, writer.decoding, size, judged=False, chooser=writer.chooser)
    kept = len(jobs) - len(left)
    return Cost(
        "generate",
        (Part("replies", len(left), len(left) * longest, times(len(left), seconds), at_most=True),),
        needed(writer.model, WRITING),
        len(left) * REPLY_BYTES if out is not None else 0,
        f"{kept:,} of {len(jobs):,} replies are kept" if kept else "",
    )


def of_judge(
    judges: Sequence[EmotionJudge],
    paid: Sequence[EmotionJudge],
    check: Callable[[Sequence[str]], Sequence[Soundness]],
    texts: Sequence[str],
    left: Sequence[str],
    written: bool,
) -> Cost:
    """Texts to be judged. paid: those of the judges that an endpoint is; texts: different ones, all; left: those not judged yet; written:
    whether what is said of them goes to a file."""
    local = [judge for judge in judges if judge not in paid]
    seconds = times(len(left), trials.reading_texts(local, check, left)) if left else 0.0
    kept = len(texts) - len(left)
    return Cost(
        "judge",
        (Part("texts", len(left), 0, seconds), Part("readings by judges", len(left) * len(judges), 0, 0.0)),
        peak(),
        len(left) * VERDICT_BYTES if written else 0,
        f"{kept:,} of {len(texts):,} texts are judged" if kept else "",
        tuple(f"asks {judge.name} {len(left):,} times, which is not in the time" for judge in paid),
    )


def of_effects(
    model: Model, circuit: Circuit, battery: Battery, settings: EffectsSettings, batch_size: int, folder: Path | None = None
) -> Cost:
    """Replies to everything that is asked, neutral texts, feedback on wrong answers, long conversations. folder: keeps what an earlier run
    has written.

    Raises:
        ArtifactError: if the circuit has no dial or lacks a part that a method adds.
    """
    every = conditions_of(circuit, settings, min(len(battery.sentences[kind]) for kind in SENTENCES))
    steering, emotions = [condition for condition in every if condition.method not in SENTENCES], len(circuit.emotions)
    asked = [group for name in ASKED for group in battery.asked[name]]
    answers, replies = _met(every, len(battery.items)), sum(_met(steering, len(battery.asked[name])) for name in ASKED)
    texts = _met(steering, len(battery.texts))
    kept_replies, kept_texts = (min(_rows(folder, name), whole) for name, whole in (("replies", answers + replies), ("texts", texts)))
    share = 1 - kept_replies / max(1, answers + replies)
    per_answer = _replying(model, circuit, battery.questions, settings, settings.item_tokens, batch_size)
    per_reply = _replying(model, circuit, asked, settings, settings.reply_tokens, batch_size)
    again = 2 * settings.rounds * len(battery.items)
    long = settings.followed * (2 * emotions + 1) * len(settings.distances)
    talk = settings.followed and (emotions + 2) * sum(settings.distances)  # read once for each request, and for each batch without one
    parts = (
        Part("answers to items", round(share * answers), 0, times(share * answers, per_answer), at_most=True),
        Part("other replies", round(share * replies), 0, times(share * replies, per_reply), at_most=True),
        Part("neutral texts", texts - kept_texts, 0, times(texts - kept_texts, _reading(model, battery))),
        Part("answers after feedback", again, 0, times(again, per_answer), at_most=True),
        Part("replies after long conversations", long, talk, plus(times(long, per_reply), times(talk, _talking(model, battery, talk)))),
    )
    kept, wanted = kept_replies + kept_texts, answers + replies + texts
    return Cost(
        "effects",
        parts,
        needed(model, WRITING),
        (wanted - kept + again + long) * REPLY_BYTES,
        f"up to {kept:,} of {wanted:,} replies and texts are kept" if kept else "",
    )


def _met(conditions: Sequence[Condition], n_prompts: int) -> int:
    """How many replies some conditions ask for."""
    return sum(len(members) for members, _ in passes(conditions, n_prompts))


def _rows(folder: Path | None, name: str) -> int:
    file = folder / f"{name}.jsonl" if folder is not None else None
    return len(whole_rows(file)) if file is not None and file.is_file() else 0


def _replying(
    model: Model, circuit: Circuit, groups: Sequence[Group], settings: EffectsSettings, tokens: int, batch_size: int
) -> float | None:
    """Seconds for each reply to some prompts, steered; nothing where there are none."""
    if not groups:
        return 0.0
    decoding = Decoding(max_new_tokens=tokens, guidance=settings.guidance, seed=settings.seed)
    some = evenly(groups, batch_size)
    requests = [asked_request(model, str(g.key), None, g.text, "none", "", g.earlier, decoding.guides) for g in some]
    return trials.writing(model, circuit, requests, decoding, min(batch_size, len(groups)), judged=False)


def _reading(model: Model, battery: Battery) -> float | None:
    """Seconds for each neutral text."""
    some = evenly(battery.texts, min(BATCH, max(1, len(battery.texts))))
    prompts = [asked_request(model, str(g.key), None, g.text, "none", "", g.earlier, False).ids for g, _ in some]
    replies = [tuple(model.text_ids(reply)) for _, reply in some]
    return times(1 / len(some), trials.timed(lambda: text_nll(model, prompts, replies, None))) if some else 0.0


def _talking(model: Model, battery: Battery, tokens: int) -> float | None:
    """Seconds for each token of a long conversation."""
    if not tokens:
        return 0.0
    text = model.text_ids(" ".join(f"{group.text} {reply}" for group, reply in battery.texts))[:TALK]
    row = TokenRow(tuple(text), tuple(range(len(text))), (0,) * len(text), ((len(text) - 1,),))
    return trials.reading_rows(model, [row], [Site(model.shape.n_layers - 1, RESID_POST)], len(text))
