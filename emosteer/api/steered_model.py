"""A loaded model with its circuit: what `emosteer.load` returns. Writes, streams, and steers the plain Hugging Face model. No torch at
import."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Unpack, cast, overload

from emosteer.api.options import Amount, DecodingOptions, SteeringOptions, WritingOptions
from emosteer.base.errors import ArtifactError, UsageError, suggest
from emosteer.circuits.dial import check_intensity
from emosteer.circuits.methods import CIRCUIT, GENERATE, METHODS, NONE
from emosteer.generation.decoding import Decoding
from emosteer.scenarios.conversations import parse_messages
from emosteer.scenarios.emotions import EMOTIONS, emotion_name
from emosteer.scenarios.prompts import POSITIONS, instruction_for
from emosteer.scenarios.scenarios import Group, GroupKey, Message
from emosteer.writing.settings import BATCH_SIZE

if TYPE_CHECKING:
    from torch import Tensor

    from emosteer.circuits.circuit import Circuit
    from emosteer.generation.generate import Reply, Request
    from emosteer.generation.streaming import Piece
    from emosteer.models.model import Model
    from emosteer.writing.jobs import Job
    from emosteer.writing.writer import Writer

#: Messages {"role": ..., "content": ...}; the reply goes on from the last.
Conversation = Sequence[Mapping[str, str]]
#: A text that the user says, a whole conversation, or a list of either.
Several = list[str] | tuple[str, ...] | Sequence[Conversation]
Prompts = str | Conversation | Several
#: One emotion for all prompts, or one per prompt; None steers nothing.
Emotion = str | Sequence[str | None] | None


@dataclass(frozen=True, eq=False)
class SteeredModel:
    """A model and the circuit that steers it. circuit: None where there is none yet; such a model can be measured and can write
    unsteered or asked by its prompt.

    Attributes:
        model: `emosteer.Model`, sites and hooks; circuit: `emosteer.Circuit`.
    """

    model: Model
    circuit: Circuit | None = None

    def __post_init__(self) -> None:
        from emosteer.base.artifacts import require_model

        if self.circuit is not None:
            require_model(self.circuit.provenance, self.model.sha256, self.model.name, "this circuit")

    def __repr__(self) -> str:
        circuit = "no circuit" if self.circuit is None else f"circuit for {', '.join(self.circuit.emotions)}"
        return f"SteeredModel({self.model.name}, {circuit})"

    @property
    def hf(self) -> Any:
        """The plain Hugging Face model."""
        return self.model.hf

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return self.model.tokenizer

    @property
    def emotions(self) -> tuple[str, ...]:
        """The emotions that the circuit knows; without one, the six that a prompt can ask for."""
        return EMOTIONS if self.circuit is None else self.circuit.emotions

    # ---- writing -------------------------------------------------------------------------------------------------------------

    @overload
    def generate(self, prompts: str | Conversation, emotion: Emotion = None, **options: Unpack[WritingOptions]) -> Reply: ...

    @overload
    def generate(self, prompts: Several, emotion: Emotion = None, **options: Unpack[WritingOptions]) -> list[Reply]: ...

    def generate(self, prompts: Prompts, emotion: Emotion = None, **options: Unpack[WritingOptions]) -> Reply | list[Reply]:
        """Writes the reply to a text or a conversation, or the replies to a list of them, as the command `generate` does.

        Args:
            prompts: a text, a conversation (a list of {"role", "content"}), or a list of either.
            emotion: one for all, or one per prompt; None writes unsteered.
            strength: multiplier of the steering, one or one per prompt; the circuit's default for the emotion if neither this nor
                `intensity` is given.
            intensity: 0 (unsteered) to 100 (as strong as the text bears), below 0, to -100, less of the emotion; needs a calibrated
                circuit.
            mix: a mixture instead of an emotion, {"sadness": 40, "anger": 20} or "sadness:40 + anger:20"; arc: mixtures over the reply,
                "fear:80 -> happiness:60", within `arc_tokens` tokens (`circuits.arcs`). They hold for all prompts. What is more than
                the text bears together is weakened, with a note on stderr.
            fade: replies of a conversation after which half of what was felt at its begin is left; personality: traits
                ({"extraversion": 0.5}), with which the mood follows what a judge reads in the user's turns (`circuits.moods`).
            vad: valence, arousal and dominance, each -1 to 1, instead: the mixture of the circuit's emotions that comes nearest
                (`circuits.points`), with a note on stderr where that is not the point.
            method: "circuit" (the default), "residual", "learned-residual", "prompt" (just asks) or "none".
            instruction: appended to the last turn, "" for nothing; the circuit's own by default. examples: whether the circuit's
                examples stand before a prompt that is steered, as they do by default.
            positions: where steering acts: "reply" (the default), or "all" as in an exported model.
            batch_size: replies written at once, 32 by default.
            max_new_tokens, temperature, top_p, repetition_penalty, seed, guidance, best_of: fields of `emosteer.Decoding`; guidance
                is 1.5 by default.

        Raises:
            UsageError: for arguments that make no sense. ArtifactError: if the circuit is missing, or has no dial and an intensity is asked
                for. DataError: if a prompt does not fit the model's context.
        """
        work = self._work(prompts, emotion, options).checked()
        replies = dict(work.written())
        return replies[0] if is_single(prompts) else [replies[row] for row in range(len(work.jobs))]

    @overload
    def stream(self, prompts: str | Conversation, emotion: Emotion = None, **options: Unpack[WritingOptions]) -> Iterator[str]: ...

    @overload
    def stream(self, prompts: Several, emotion: Emotion = None, **options: Unpack[WritingOptions]) -> Iterator[Piece]: ...

    def stream(self, prompts: Prompts, emotion: Emotion = None, **options: Unpack[WritingOptions]) -> Iterator[str] | Iterator[Piece]:
        """Writes as `generate` does and yields the text as it comes; the pieces of a reply join to its text. Arguments and errors as
        there; what is wrong with them is said at once, not at the first piece.

        Returns:
            For one prompt its pieces of text. For a list, which is written as one batch, `Piece(row, text, finish_reason)`.
        """
        from emosteer.generation.streaming import Piece, stream

        work = self._work(prompts, emotion, options).checked()
        if work.writer.decoding.chooses:  # which is the best is known when all are there
            pieces: Iterator[Piece] = (Piece(row, reply.text, reply.finish_reason) for row, reply in work.written())
        else:
            pieces = stream(self.model, work.requests, work.writer.plan(work.jobs), work.writer.decoding)
        return (piece.text for piece in pieces if piece.text) if is_single(prompts) else pieces

    # ---- the plain model -----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def steering(self, emotion: Emotion, **options: Unpack[SteeringOptions]) -> Iterator[None]:
        """Steers the plain Hugging Face model for the length of a block, as `generate` steers without guidance and examples: `with
        m.steering("fear"): m.hf.generate(**m.inputs(text))`.

        Args:
            emotion: one for every row of whatever batch comes, or one per row.
            strength, intensity, method, positions: as for `generate`.

        Raises:
            UsageError: inside another block, and for passes that cannot be steered so (see `generation.plain_steering`). Otherwise as
                `generate`.
        """
        from emosteer.generation.plain_steering import steered

        rows = [emotion] if emotion is None or isinstance(emotion, str) else list(emotion)
        method = self._method(options)
        if METHODS[method].asks:
            raise UsageError(f"the method '{method}' steers nothing: it asks in the prompt; use m.generate(..., method='{method}')")
        alone = self._alone()
        jobs = alone._jobs([""] * len(rows), [(Message("user", ""),)] * len(rows), rows, options)
        with steered(self.model, alone._writer(cast(WritingOptions, options)).plan(jobs)):
            yield

    def _alone(self) -> SteeredModel:
        """The same with a circuit that shows no examples."""
        return self if self.circuit is None else replace(self, circuit=self.circuit.without_examples())

    def inputs(self, prompts: Prompts, *, instruction: str | None = None) -> dict[str, Tensor]:
        """The prompts as `generate` reads them, for `m.hf.generate(**inputs)`: input_ids and attention_mask [prompt, pos], padded on the
        left."""
        import torch

        options: WritingOptions = {} if instruction is None else {"instruction": instruction}
        rows = [list(request.ids) for request in self._work(prompts, None, options).requests]
        width = max(map(len, rows), default=0)
        ids = torch.tensor([[self.model.pad_id] * (width - len(row)) + row for row in rows], device=self.model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=self.model.device)
        return {"input_ids": ids, "attention_mask": mask}

    # ---- how -----------------------------------------------------------------------------------------------------------------

    def _work(self, prompts: Prompts, emotion: Emotion, options: WritingOptions) -> _Work:
        """Everything that is prepared before the first token."""
        if not options.get("examples", True) and self.circuit is not None and self.circuit.examples:
            return self._alone()._work(prompts, emotion, options)
        rows = conversations(prompts)
        emotions = [emotion] * len(rows) if emotion is None or isinstance(emotion, str) else list(emotion)
        if len(emotions) != len(rows):
            raise UsageError(f"expected one emotion, or one for each of {len(rows)} prompts, found {len(emotions)}")
        names = ["text"] if is_single(prompts) else [f"line-{number}" for number in range(1, len(rows) + 1)]
        writer = self._writer(options)
        felt = self._felt_jobs(names, rows, emotions, options, writer.decoding.max_new_tokens)
        jobs = self._jobs(names, rows, emotions, options) if felt is None else felt
        return _Work(writer, jobs, writer.requests(jobs))

    def _jobs(
        self, names: Sequence[str], rows: Sequence[tuple[Message, ...]], emotions: Sequence[str | None], options: SteeringOptions
    ) -> list[Job]:
        """One job per conversation: its emotion, and how strongly. The names are those that `generate --input` gives."""
        from emosteer.writing.jobs import jobs_for

        method = self._method(options)
        strengths = per_row("strength", options.get("strength"), len(rows))
        intensities = per_row("intensity", options.get("intensity"), len(rows))
        check_amounts(method, strengths, intensities)
        if method != NONE and all(emotion is None for emotion in emotions) and any(a is not None for a in (*strengths, *intensities)):
            raise UsageError(f"an intensity or a strength is of an emotion, and none is named; expected one of {', '.join(self.emotions)}")
        jobs: list[Job] = []
        for name, messages, emotion, strength, intensity in zip(names, rows, emotions, strengths, intensities, strict=True):
            group, earlier = Group(GroupKey("", ""), "", messages[-1].content), messages[:-1]
            if emotion is None or method == NONE:
                jobs += jobs_for(name, group, (NONE,), NONE, None, None, {}, earlier)
                continue
            circuit, (emotion,) = self._circuit_for(method, emotion)
            dialled = {emotion: circuit.strength_at(emotion, intensity)} if circuit is not None and intensity is not None else {}
            jobs += jobs_for(name, group, (emotion,), method, strength, circuit, dialled, earlier)
        return jobs

    def _felt_jobs(
        self,
        names: Sequence[str],
        rows: Sequence[tuple[Message, ...]],
        emotions: Sequence[str | None],
        options: WritingOptions,
        tokens: int,
    ) -> list[Job] | None:
        """One job per conversation that feels a mixture or an arc, or whose feelings change over turns; None where nothing of it is
        asked for."""
        from emosteer.judges.reader import Reader
        from emosteer.writing.feelings import Feeling
        from emosteer.writing.jobs import felt_job

        feeling = Feeling.of(
            *(options.get(name) for name in ("mix", "arc", "arc_tokens", "fade", "personality", "vad"))  # type: ignore[arg-type]
        )
        if feeling is None:
            return None
        method = self._method(options)
        if method != CIRCUIT or options.get("strength") is not None:
            raise UsageError(
                f"mix, arc, fade, personality and vad belong to the method '{CIRCUIT}', and go by intensities, not by strengths"
            )
        intensities = per_row("intensity", options.get("intensity"), len(rows))
        check_amounts(method, [], intensities)
        feeling.tell_weakened()
        feeling.tell_reached(self.emotions)
        read, jobs = Reader().shares, []
        for name, messages, emotion, intensity in zip(names, rows, emotions, intensities, strict=True):
            felt = feeling.starting(() if emotion is None else (emotion,), intensity)[0]
            circuit, _ = self._circuit_for(method, *(felt.arc.emotions if felt.arc is not None else ()))
            assert circuit is not None
            jobs.append(felt_job(name, messages, felt.now(messages, circuit.emotions, read), circuit, tokens))
        return jobs

    def _method(self, options: SteeringOptions) -> str:
        method = options.get("method", CIRCUIT)
        if method not in GENERATE:
            raise UsageError(f"unknown method '{method}'{suggest(method, GENERATE)}; expected {', '.join(GENERATE)}")
        if options.get("positions", "reply") not in POSITIONS:
            raise UsageError(f"expected positions to be reply or all, found '{options['positions']}'")
        return method

    def _circuit_for(self, method: str, *emotions: str) -> tuple[Circuit | None, tuple[str, ...]]:
        """The circuit, where the method needs one, once it is sure that it knows the emotions; and these in their one spelling."""
        if METHODS[method].asks:
            return None, tuple(map(emotion_name, emotions))
        if self.circuit is None:
            name = self.model.reference
            raise ArtifactError(
                f"there is no circuit for {self.model.name} yet; have it made with emosteer.load({name!r}, auto=True), or name one with "
                f"circuit=, or use method='prompt'"
            )
        known = tuple(self.circuit.emotions[self.circuit.index(emotion)] for emotion in emotions)
        part = METHODS[method].vectors
        if part is not None:
            self.circuit.require(part)
        return self.circuit, known

    def _writer(self, options: WritingOptions) -> Writer:
        from emosteer.writing.best_of import chooser_for
        from emosteer.writing.writer import Writer

        unknown = [name for name in options if name not in (*WritingOptions.__annotations__, *DecodingOptions.__annotations__)]
        if unknown:
            known = sorted(WritingOptions.__annotations__)
            raise UsageError(f"unknown option '{unknown[0]}'{suggest(unknown[0], known)}; expected some of {', '.join(known)}")
        chosen = {name: value for name, value in options.items() if name in DecodingOptions.__annotations__}
        decoding = Decoding.usual(**cast(DecodingOptions, chosen))
        return Writer(
            self.model,
            self.circuit,
            decoding,
            instruction_for(options.get("instruction"), self.circuit.instruction if self.circuit else None),
            self._method(options),
            options.get("batch_size", BATCH_SIZE),
            positions=options.get("positions", "reply"),
            chooser=chooser_for(self.model, decoding),
        )


@dataclass(frozen=True)
class _Work:
    """What is to be written, row by row, and by whom."""

    writer: Writer
    jobs: list[Job]
    requests: list[Request]

    def checked(self) -> _Work:
        """Itself, once it is sure that it can be written now.

        Raises:
            DataError: for a prompt that is too long. UsageError: inside a `steering` block.
        """
        from emosteer.generation.generate import check_lengths
        from emosteer.generation.plain_steering import refuse_steered

        model = self.writer.model
        refuse_steered(model)
        check_lengths(self.requests, self.writer.decoding, model.shape.context, model.name)
        return self

    def written(self) -> Iterator[tuple[int, Reply]]:
        """The replies with their rows, each as soon as its batch is done."""
        work = self.writer.work(self.jobs)
        return (done for batch in work.order for some in work.write(batch) for done in some)


def is_single(prompts: Prompts) -> bool:
    """Whether it is one text or one conversation."""
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], Mapping))


def conversations(prompts: Prompts) -> list[tuple[Message, ...]]:
    """The prompts as conversations; a text is one of one turn.

    Raises:
        UsageError: for an empty text. DataError: for a conversation that no reply can follow.
    """
    rows = cast("list[str | Conversation]", [prompts] if is_single(prompts) else list(prompts))
    read: list[tuple[Message, ...]] = []
    for number, prompt in enumerate(rows, 1):
        if not isinstance(prompt, str):
            turns = [dict(turn) if isinstance(turn, Mapping) else turn for turn in prompt]
            read.append(parse_messages(turns, f"conversation {number}"))
        elif prompt.strip():
            read.append((Message("user", prompt.strip()),))
        else:
            raise UsageError("the text to answer is empty")
    return read


def per_row(name: str, amount: Amount, n_rows: int) -> list[float | None]:
    """An amount for every row.

    Raises:
        UsageError: for another number of them, or one that is not finite.
    """
    amounts = [amount] * n_rows if amount is None or isinstance(amount, (int, float)) else list(amount)
    if len(amounts) != n_rows:
        raise UsageError(f"expected one {name}, or one for each of {n_rows} prompts, found {len(amounts)}")
    for number in amounts:
        if number is not None and not math.isfinite(number):
            raise UsageError(f"expected {name} to be a finite number, found {number}")
    return amounts


def check_amounts(method: str, strengths: Sequence[float | None], intensities: Sequence[float | None]) -> None:
    """Refuses a strength or an intensity where it has no meaning.

    Raises:
        UsageError: for both, for a method that has none, or for an intensity outside the dial.
    """
    strong, dialled = any(s is not None for s in strengths), [i for i in intensities if i is not None]
    if strong and dialled:
        raise UsageError("expected an intensity or a strength, found both")
    if strong and METHODS[method].strength is None:
        raise UsageError(f"a strength has no meaning with the method '{method}'")
    if dialled and not METHODS[method].dial:
        raise UsageError(f"an intensity has no meaning with the method '{method}'; it belongs to '{CIRCUIT}'")
    for intensity in dialled:
        check_intensity(intensity, "intensity", signed=True)
