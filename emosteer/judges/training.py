"""`make judge`: fits the judges that come along and measures each on texts that it never saw, sources left out whole among them.

- `public`: the encoder fine-tuned on public texts that people labelled.
- `embedded`: the same, fine-tuned further on all sources: the public ones and the project's own (data/judge/).
- `linear`: a linear head on the frozen encoder, on the project's own texts and on models' replies that were read blind.
- the checks of soundness and of answers (`check_training`).

The card in the file holds what is printed here. The reply banks are never fitted on by a judge of emotions: they are a test.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from emosteer.base import artifacts
from emosteer.base.artifacts import Provenance
from emosteer.base.cache_folder import cache_dir
from emosteer.base.errors import DataError, EmosteerError
from emosteer.base.files import read_jsonl, sha256_file, sha256_text
from emosteer.base.progress import note
from emosteer.base.tables import print_table
from emosteer.judges.adapters import Adapter, TunedJudge
from emosteer.judges.answers import Answered
from emosteer.judges.check_training import FACTOR, beside_readers, fit_answers, fit_soundness, measure_answers, read_replies, set_by
from emosteer.judges.embedded import ASSET, ENCODER, KIND, LinearHead, LinearJudge, fit_head, shared_encoder
from emosteer.judges.fine_tuning import DTYPES, FineTuneSettings, calibrated, fine_tune, quicker_dtype
from emosteer.judges.measuring import measured, some_of
from emosteer.judges.protocol import LABELS
from emosteer.judges.sources import Labelled, Source, held_out, read_public
from emosteer.judges.storage import load_adapter, load_heads, save_judges
from emosteer.scenarios.prompt_sets import read_groups
from emosteer.scenarios.scenarios import VALENCES, GroupKey, data_path, read_bank
from emosteer.scenarios.splits import stable_share

#: Replies that models wrote, read blind with their prompts: what they voice, and whether they answer.
READ = "judge/model_replies.jsonl"
#: More of them; of the last, those to development prompts are fitted on by nothing.
CHECKED = ("judge/checked_replies.jsonl", "judge/read_replies.jsonl")
#: More again, whose readers were strict about soundness: what makes sense, and how much of it is enough, is learned from them alone. The
#: checks learn from all of them, the judges of emotions from the first.
STRICTLY = "judge/strictly_read.jsonl"
ALSO_STRICTLY = ("judge/greedy_read.jsonl", "judge/sampled_read.jsonl")
#: Replies to development prompts that other strict readers read, who accept more as an answer: the checks are set by both kinds of readers
#: and fitted on none of these.
UNSEEN = "judge/examples_read.jsonl"
#: Whom the checks are set beside, in the card: those of `READ` and `CHECKED`, of the strict files, and of `UNSEEN`.
BESIDE = ("readers", "strict readers", "strict readers of development prompts")
#: The source that the replies of `CHECKED` and `STRICTLY` are, of which whole prompts are held out.
READ_REPLIES = "read-replies"
OWN = {
    "sentences": "judge/sentences.jsonl",
    "replies": "judge/replies.jsonl",
    "spoken": "judge/spoken.jsonl",
    "toned": "judge/toned.jsonl",
    "model-replies": READ,
}
FOREIGN = "judge/other_languages.jsonl"
PAIRS = "judge/answer_pairs.jsonl"
#: Reply banks with their prompts: a test of the emotion judges, and what the answer check is fitted on.
BANKS = {
    "bank of scenes": ("sev/train.jsonl", "replies/train.jsonl"),
    "spoken bank": ("prompts/train.jsonl", "replies/spoken.jsonl"),
    "plain bank": ("prompts/train.jsonl", "replies/plain.jsonl"),
}
#: Shares of the draws that each source has; those of sources left out go to the others.
SHARES = {
    "goemotions-ekman": 0.35,
    "xed-en": 0.11,
    "sentences": 0.08,
    "replies": 0.08,
    "spoken": 0.09,
    "toned": 0.12,
    "model-replies": 0.08,
    READ_REPLIES: 0.09,
}
#: The same for the judge of the public sources alone.
PUBLIC_SHARES = {"goemotions-ekman": 0.378, "xed-en": 0.18}
#: `embedded` goes on from `public`, for so many times its steps.
MORE_STEPS = 1.2
#: Sources whose texts are sound, for the soundness head.
SOUND_TEXTS = ("sentences", "replies")
#: Of the bank that circuits are made from, whose replies make sense though steered replies resemble them.
SENSIBLE_BANK, SENSIBLE_REPLIES = "plain bank", 1200
#: Texts of a source that a judge is measured on, at most; all of GoEmotions' test split.
MOST_MEASURED = 1000
#: Steps of the fits that leave a source out: a third of the others', since there are four of them.
LEFT_OUT_STEPS = 300


def read_own(name: str, file: str) -> Source:
    """A source of the project's own.

    Raises:
        DataError: naming file and line, if a label is unknown, a text empty, or a text is there twice.
    """
    path, parts, seen = data_path(file), {False: list[Labelled](), True: list[Labelled]()}, set[str]()
    for number, row in read_jsonl(path, "judge texts"):
        label, text = row.get("label"), row.get("text")
        if label not in LABELS or not (isinstance(text, str) and text.strip()):
            raise DataError(f"{path}:{number}: expected 'label' to be one of {', '.join(LABELS)} and 'text' a text that is not empty")
        if text in seen:
            raise DataError(f"{path}:{number}: this text is there twice; a held-out text must not be fitted on")
        seen.add(text)
        parts[held_out(text)].append((text, label))
    return Source(name, tuple(parts[False]), tuple(parts[True]), False, {file: sha256_file(path)})


def read_source_of_replies() -> Source:
    """Replies that models wrote and readers labelled, as a source whose held-out texts answer other prompts than those of it that are
    fitted on. (`model_replies.jsonl`, which is held out by text, has replies to some of the same prompts.)"""
    files = (*CHECKED, STRICTLY)
    read, seen = read_replies(*map(data_path, files)), set[str]()
    parts: dict[bool, list[Labelled]] = {True: [], False: []}
    for part, texts in parts.items():  # the held-out ones first: a text that both parts hold is not fitted on
        for reply in read[part]:
            if reply.pair[1] not in seen:
                seen.add(reply.pair[1])
                texts.append((reply.pair[1], reply.label))
    return Source(READ_REPLIES, tuple(parts[False]), tuple(parts[True]), False, {file: sha256_file(data_path(file)) for file in files})


def read_sources(public: Path) -> list[Source]:
    """The public sources of a folder, then the project's own.

    Raises:
        DataError: if two go by one name, or as for `read_own` and `read_public`.
    """
    sources = [*read_public(public), *(read_own(name, file) for name, file in OWN.items()), read_source_of_replies()]
    names = [source.name for source in sources]
    if len(set(names)) != len(names):
        raise DataError(f"expected sources of different names, found {', '.join(names)}; rename the file in {public}")
    return sources


def read_banks() -> tuple[dict[str, list[Labelled]], list[Answered]]:
    """The reply banks as (bank's name -> labelled replies, replies with their prompts)."""
    labelled: dict[str, list[Labelled]] = {}
    answered: list[Answered] = []
    for name, (prompts, replies) in BANKS.items():
        bank = read_bank(data_path(replies))
        labelled[name] = [(text, label) for row in bank.values() for label, text in row.items()]
        for group in read_groups(data_path(prompts)):
            others = [bank.get(GroupKey(group.key.scenario, v), {}) for v in VALENCES if group.key.valence and v != group.key.valence]
            for tone, reply in bank.get(group.key, {}).items():
                answered.append(Answered(group.said, reply, tone, tuple(row[tone] for row in others if tone in row)))
    return labelled, answered


# ---- fitting -----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Workshop:
    """Where fitted adapters are kept, so that a run goes on where it was stopped and several can share the work. only: names to fit; the
    others are left to other runs (None: fit what is not there)."""

    folder: Path
    only: tuple[str, ...] | None = None

    def adapter(self, name: str, what: object, fit: Callable[[], Adapter]) -> Adapter | None:
        """The kept adapter of a name that was fitted on the same texts in the same way, else a new one; None where it is not to be fitted.

        Args:
            what: everything that decides the result.
        """
        path = self.folder / f"{name}-{sha256_text(repr(what))[:12]}.safetensors"
        if path.is_file():
            return load_adapter(path, name)
        if self.only is not None and name not in self.only:
            return None
        fitted = fit()
        save_judges(path, {}, {name: fitted}, {}, Provenance(ENCODER, "", "", "one part of a run of `make judge`"))
        return load_adapter(path, name)  # as it is rounded


def tuned(
    sources: Sequence[Source],
    name: str,
    settings: FineTuneSettings,
    shares: Mapping[str, float],
    workshop: Workshop,
    start: TunedJudge | None = None,
) -> TunedJudge | None:
    """A fine-tuned judge, calibrated on texts of its sources that it was not fitted on, every source counting alike.

    Args:
        start: the judge that it goes on from.
    """
    drawn = sum(shares.get(source.name, 1.0) for source in sources)
    texts = [(*sorted(source.files.items()), round(shares.get(source.name, 1.0) / drawn, 4)) for source in sources]
    first = None if start is None else start.adapter
    what = [texts, asdict(settings), *([] if first is None else [first.key])]
    adapter = workshop.adapter(name, what, lambda: fine_tune(parted(sources, False), shares, settings, f"judge '{name}'", start=first))
    return None if adapter is None else TunedJudge.of(shared_encoder(), at_temperature(adapter, parted(sources, True), name), name)


def parted(sources: Sequence[Source], apart: bool) -> dict[str, list[Labelled]]:
    """The texts that adapters are fitted on, or the twentieth of them, by hash, that serves for the temperature alone."""
    return {s.name: [t for t in s.train if (stable_share(f"temperature/{t[0]}", 0) < 0.05) == apart] for s in sources}


def at_temperature(adapter: Adapter, kept: Mapping[str, Sequence[Labelled]], name: str) -> Adapter:
    """The adapter with the temperature that makes texts likeliest, every source counting alike. It is found anew in every run: its texts
    may change while what was fitted stays."""
    judge = TunedJudge.of(shared_encoder(), adapter, name)
    drawn = [some_of(members, 400) for members in kept.values() if members]
    texts = [(text, label, 1 / len(some)) for some in drawn for text, label in some]
    logits = judge.probabilities([text for text, *_ in texts]).clamp_min(1e-30).log()
    answers = torch.tensor([LABELS.index(label) for _, label, _ in texts])
    return calibrated(adapter, logits, answers, torch.tensor([weight for *_, weight in texts]))


def train(public: Path, out: Path, settings: FineTuneSettings, left_out_steps: int, workshop: Workshop) -> dict[str, Any] | None:
    """Fits everything, writes it with its card to `out`, and returns the card; None where a part was left to other runs.

    Args:
        public: folder of the public texts; left_out_steps: of the fits that leave out each public source in turn, only to measure; 0 for
            none. The project's own sources have one author, and are left out together: by `public`.
    """
    sources = read_sources(public)
    outside, own = [s for s in sources if s.public], [s for s in sources if not s.public]
    banks, answered = read_banks()
    longer = replace(settings, steps=round(MORE_STEPS * settings.steps))
    people = tuned(outside, "public", settings, PUBLIC_SHARES, workshop)
    made = {"embedded": None if people is None else tuned(sources, "embedded", longer, SHARES, workshop, people), "public": people}
    shorter = replace(settings, steps=left_out_steps)
    without = {
        source.name: tuned([s for s in sources if s is not source], f"without-{source.name}", shorter, SHARES, workshop)
        for source in (outside if left_out_steps else [])
    }
    judges, left_out = {n: j for n, j in made.items() if j is not None}, {n: j for n, j in without.items() if j is not None}
    if len(judges) < len(made) or len(left_out) < len(without):
        return None
    tests = {s.name: list(s.test) if s.name.startswith("goemotions") else some_of(s.test, MOST_MEASURED) for s in sources}
    emotional = {name: some_of(texts, MOST_MEASURED) for name, texts in banks.items()}
    encoder = shared_encoder()
    chosen = [labelled for source in own for labelled in source.train]
    note(f"fitting the linear judge on {len(chosen)} texts")
    linear = fit_head(encoder.features([t for t, _ in chosen]), torch.tensor([LABELS.index(label) for _, label in chosen]), LABELS)
    checks, measured_checks = fit_checks(own, banks, answered)
    measuring = [*judges.items(), ("linear", LinearJudge(encoder, linear))]
    card: dict[str, Any] = {
        "settings": {**asdict(settings), "more_steps": MORE_STEPS, "left_out_steps": left_out_steps},
        "shares": {"embedded": SHARES, "public": PUBLIC_SHARES},
        "fitted_on": {s.name: len(s.train) for s in sources},
        "emotions": {name: measured(judge, {**tests, **emotional}) for name, judge in measuring},
        "left_out": {name: measured(judge, {name: tests[name]})[name] for name, judge in left_out.items()}
        | measured(judges["public"], {s.name: tests[s.name] for s in own}),
        **measured_checks,
    }
    hashes = {name: digest for source in sources for name, digest in source.files.items()} | hashes_of_checks()
    method = "low-rank adapters in the upper layers of the encoder, and linear heads on layer statistics"
    provenance = Provenance(ENCODER, "", "", method, {"held_out": "by the text's or the prompt's hash, 1 in 7"}, data=hashes)
    save_judges(out, {"emotion": linear, **checks}, {name: judge.adapter for name, judge in judges.items()}, card, provenance)
    return card


def fit_checks(
    own: Sequence[Source], banks: Mapping[str, Sequence[Labelled]], answered: Sequence[Answered]
) -> tuple[dict[str, LinearHead], dict[str, Any]]:
    """The heads of both checks, and what they do on texts and replies that were held out.

    Args:
        own: the project's own sources; banks, answered: as `read_banks` gives them.
    """
    encoder = shared_encoder()
    read, strictly = (read_replies(*map(data_path, files)) for files in ((READ, *CHECKED), (STRICTLY, *ALSO_STRICTLY)))
    unseen = [reply for part in read_replies(data_path(UNSEEN)).values() for reply in part]
    known = {reply.pair[0] for reply in (*read[True], *strictly[True], *unseen)}  # held out by one file, held out in every other
    read, strictly = ({**both, False: [r for r in both[False] if r.pair[0] not in known]} for both in (read, strictly))
    plain = [text for source in own if source.name in SOUND_TEXTS for text, _ in (*source.train, *source.test)]
    foreign = [str(row["text"]) for _, row in read_jsonl(data_path(FOREIGN), "texts in other languages")]
    note("fitting the check of answers")
    learned, strict = [*read[False], *strictly[False]], len(strictly[False])
    also = unseen * max(1, round(strict / max(1, len(unseen))))  # two generations of strict readers, who count alike
    check, margins = fit_answers(encoder, answered, learned, also)
    note("fitting the check of soundness")
    replies = [text for text, _ in some_of(banks.get(SENSIBLE_BANK, ()), SENSIBLE_REPLIES)]
    answering = {reply.pair: margin for reply, margin in zip([*learned, *also], margins.tolist(), strict=True)}
    soundness, measured_soundness = fit_soundness(encoder, plain, foreign, read, strictly, replies, answering, also)
    check = set_by(check, margins, learned, also, strict, measured_soundness[FACTOR])
    pairs = [row for _, row in read_jsonl(data_path(PAIRS), "answer pairs")]
    card = {
        "soundness": measured_soundness,
        "answers": measure_answers(check, pairs, [*read[True], *strictly[True]]),
        **{who: beside_readers(check, soundness, some) for who, some in zip(BESIDE, (read[True], strictly[True], unseen), strict=True)},
    }
    return {**soundness.stored(), "answers": check.head}, card


def hashes_of_checks() -> dict[str, str]:
    """The files that checks are fitted on and measured with, and the banks that judges are measured with."""
    files = (FOREIGN, PAIRS, *CHECKED, STRICTLY, *ALSO_STRICTLY, UNSEEN, *(file for both in BANKS.values() for file in both))
    return {file: sha256_file(data_path(file)) for file in files}


def refit_checks(kept: Path, out: Path) -> dict[str, Any]:
    """Fits both checks anew and writes them with the judges of emotions of a file, which stay as they are; returns the card.

    Raises:
        ArtifactError: if it is no judges' file.
    """
    heads, before = load_heads(kept), artifacts.load(kept, KIND)
    adapters = {name: load_adapter(kept, name) for name in before.fields.get("adapters", {})}
    checks, found = fit_checks([read_own(name, file) for name, file in OWN.items()], *read_banks())
    card = {**before.fields["card"], **found}
    provenance = replace(before.provenance, data={**before.provenance.data, READ: sha256_file(data_path(READ)), **hashes_of_checks()})
    save_judges(out, {**heads, **checks}, adapters, card, provenance)
    return card


# ---- printing ----------------------------------------------------------------------------------------------------------------------


def print_card(card: Mapping[str, Any]) -> None:
    """The tables of a card."""
    columns = ("texts of", "n", "with neutral", "six-way", "macro-F1", "calibration error", *LABELS)
    for name, by_source in card["emotions"].items():
        print(f"\n{name}, on texts that were held out (reply banks: none of their texts was fitted on); the last columns are recalls")
        print_table(columns, [_line(source, row) for source, row in by_source.items()])
    if card["left_out"]:
        print("\nfitted without the source that it is measured on (for the project's own: without all of its own, which is `public`)")
        print_table(columns, [_line(source, row) for source, row in card["left_out"].items()])
    print("\nsoundness, and whether a reply answers its prompt (hand-made pairs)")
    print_table(
        ("text", "n", "called unsound"),
        [(name, row["n"], row["called_unsound"]) for name, row in card["soundness"].items() if name != FACTOR],
    )
    print_table(("pair", "n", "called an answer"), [(name, row["n"], row["called_answer"]) for name, row in card["answers"].items()])
    for who in BESIDE:
        for check, row in card.get(who, {}).items():
            agreed = f"agrees with {who} in {row['accuracy']:.1%}, {row['balanced_accuracy']:.1%} balanced"
            print(f"\n{check}: the check {agreed}; shares that pass, on prompts that were held out")
            lines = [(name, of["n"], of["readers"], of["check"]) for name, of in row["by_method"].items()]
            print_table(("method", "n", "readers", "check"), lines)


def _line(source: str, row: Mapping[str, Any]) -> tuple[Any, ...]:
    shares = (row["accuracy"], row["accuracy_six_way"])
    recalls = (f"{row['recall'][label]:.2f}" if label in row["recall"] else "-" for label in LABELS)
    percent = ("-" if share is None else f"{share:.1%}" for share in shares)
    return source, row["n"], *percent, f"{row['macro_f1']:.3f}", f"{row['expected_calibration_error']:.3f}", *recalls


def main() -> None:
    """Fits, writes and prints."""
    parser = argparse.ArgumentParser(description="Fit the judges that come along; public labelled texts are read from a folder.")
    parser.add_argument("public", type=Path, nargs="?", help="folder of public labelled texts (emosteer.judges.sources fetches them)")
    parser.add_argument("--checks-only", action="store_true", help="fit the two checks alone, and keep the judges of emotions as shipped")
    parser.add_argument("--out", type=Path, default=ASSET)
    parser.add_argument("--steps", type=int, default=FineTuneSettings.steps, help="of fine-tuning")
    parser.add_argument(
        "--left-out-steps", type=int, default=LEFT_OUT_STEPS, help="of the fits that leave out each source in turn; 0: none"
    )
    parser.add_argument(
        "--parts", type=Path, help="folder that fitted parts are kept in, so that a run goes on; the cache folder by default"
    )
    parser.add_argument("--only", help="fit these parts alone, with commas, beside another run that fits the others")
    parser.add_argument(
        "--dtype", choices=("auto", *DTYPES), default="auto", help="what fine-tuning computes in; auto: the faster one here, by measuring"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    parts = options.parts or cache_dir() / "judge-training"
    workshop = Workshop(parts, tuple(options.only.split(",")) if options.only else None)
    if options.checks_only == (options.public is not None):
        parser.error("give the folder of public labelled texts, or --checks-only")
    try:
        if options.checks_only:
            card: dict[str, Any] | None = refit_checks(ASSET, options.out)
        else:
            settings = FineTuneSettings(steps=options.steps, dtype=quicker_dtype() if options.dtype == "auto" else options.dtype)
            card = train(options.public, options.out, settings, options.left_out_steps, workshop)
    except EmosteerError as error:
        raise SystemExit(f"emosteer: {error}") from error
    if card is None:
        print(f"parts are kept in {parts}; a run without --only fits what is missing and puts them together")
    else:
        tell(card, options.json, options.out, print_card)


def tell(card: dict[str, Any], as_json: bool, out: Path, shown: Callable[[dict[str, Any]], None]) -> None:
    """Prints what was measured, and where it was written."""
    if as_json:
        print(json.dumps(card, indent=2))
    else:
        shown(card)
        print(f"wrote {out} ({sha256_file(out)})")


if __name__ == "__main__":
    main()
