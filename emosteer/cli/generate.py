"""`emosteer generate`: replies that carry an emotion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from emosteer.base.errors import UsageError, suggest
from emosteer.base.processes import world
from emosteer.circuits.arcs import ARC_TOKENS
from emosteer.circuits.dial import MAX_STRENGTH
from emosteer.circuits.methods import CIRCUIT, GENERATE, METHODS, NONE, Kind
from emosteer.circuits.places import ARTIFACTS
from emosteer.cli.announce import DryRunOption, tell
from emosteer.cli.engine_options import engine_options
from emosteer.cli.generate_inputs import Input, inputs_of
from emosteer.cli.limits import MaxHarmOption, warn_of_harm
from emosteer.cli.options import (
    DEFAULT_MODEL,
    BestOfOption,
    DeviceMapOption,
    DeviceOption,
    DtypeOption,
    ModelOption,
    NoExamplesOption,
    PenalisePromptOption,
    RootOption,
    SeedOption,
    complete_emotion,
    one_of,
)
from emosteer.cli.write_replies import write_replies
from emosteer.generation.decoding import GUIDANCE, MAX_TOKENS, Decoding
from emosteer.scenarios.prompts import POSITIONS, instruction_for
from emosteer.scenarios.scenarios import EMOTIONS, Message, parse_emotions
from emosteer.side_effects.settings import Limits
from emosteer.writing.feelings import Feeling
from emosteer.writing.settings import BATCH_SIZE

if TYPE_CHECKING:
    from emosteer.circuits.circuit import Circuit
    from emosteer.models.model import Model
    from emosteer.serving.vllm_writer import Served
    from emosteer.writing.jobs import Job, ReplyWriter


def generate(
    text: Annotated[str | None, typer.Argument(help="What the user says; '-' or nothing reads stdin.", show_default=False)] = None,
    emotion: Annotated[
        str | None,
        typer.Option(
            "--emotion", "-e", help="One emotion, several with commas, or 'all'.", show_default=False, autocompletion=complete_emotion
        ),
    ] = None,
    model: ModelOption = DEFAULT_MODEL,
    method: Annotated[str, typer.Option(help="circuit, residual, learned-residual, prompt (just asks) or none (unsteered).")] = CIRCUIT,
    strength: Annotated[
        float | None,
        typer.Option(
            min=-MAX_STRENGTH, max=MAX_STRENGTH, help="Multiplier; the circuit's own default per emotion if not given.", show_default=False
        ),
    ] = None,
    intensity: Annotated[
        float | None,
        typer.Option(
            help="0 (unsteered) to 100 (as strong as the text bears); below 0, to -100, less of the emotion; needs `calibrate`.",
            show_default=False,
        ),
    ] = None,
    mix: Annotated[
        str | None,
        typer.Option(help="Emotions with their intensities, such as 'sadness:40 + anger:20'.", metavar="MIXTURE", show_default=False),
    ] = None,
    arc: Annotated[
        str | None,
        typer.Option(help="Mixtures over the reply, such as 'fear:80 -> happiness:60'.", metavar="ARC", show_default=False),
    ] = None,
    arc_tokens: Annotated[
        int | None,
        typer.Option(max=MAX_TOKENS, help=f"Tokens from the arc's begin to its end: {ARC_TOKENS} if not given.", show_default=False),
    ] = None,
    fade: Annotated[
        float | None,
        typer.Option(
            help="In conversations: replies after which half of the intensity that it began with is left.",
            metavar="REPLIES",
            show_default=False,
        ),
    ] = None,
    personality: Annotated[
        str | None,
        typer.Option(
            help="The mood follows what a judge reads in the user's turns: neutral, or traits such as 'extraversion:0.5, stability:-1'.",
            metavar="TRAITS",
            show_default=False,
        ),
    ] = None,
    vad: Annotated[
        str | None,
        typer.Option(
            help="A point of valence, arousal and dominance (-1 to 1), such as 0.2,0.9,0.3: the nearest mixture of the circuit's emotions.",
            metavar="V,A,D",
            show_default=False,
        ),
    ] = None,
    positions: Annotated[
        str | None,
        typer.Option(
            help="Where steering acts: reply (what writes the reply, the default), or all (the prompt too, as in an exported model).",
            show_default=False,
        ),
    ] = None,
    source: Annotated[
        Path | None, typer.Option("--input", "-i", help="SEV or prompt file, or lines with 'text' or 'messages'.", metavar="FILE.jsonl")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write one reply a line; a rerun goes on.", metavar="FILE.jsonl")] = None,
    circuit: Annotated[Path | None, typer.Option(help="Circuit file; else artifacts/, else the shipped one.", metavar="FILE")] = None,
    auto: Annotated[bool, typer.Option("--auto", help="Make directions and circuit first where they are missing.")] = False,
    max_new_tokens: Annotated[int, typer.Option(max=MAX_TOKENS, help="Longest reply, in tokens.")] = Decoding.max_new_tokens,
    temperature: Annotated[float, typer.Option(max=100, help="0 is greedy.")] = Decoding.temperature,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling; 1 is all.")] = Decoding.top_p,
    repetition_penalty: Annotated[float, typer.Option(max=100, help="1 is none.")] = Decoding.repetition_penalty,
    guidance: Annotated[
        float | None,
        typer.Option(
            max=100,
            help=f"How far replies lean towards the prompt, away from what would be said to nothing: {GUIDANCE:g} if not given; 1 is none, "
            "faster, and all that vLLM has.",
            show_default=False,
        ),
    ] = None,
    instruction: Annotated[
        str | None, typer.Option(help="Appended to every prompt, '' for nothing; the circuit's own if not given.", show_default=False)
    ] = None,
    penalise_prompt: PenalisePromptOption = False,
    no_examples: NoExamplesOption = False,
    best_of: BestOfOption = Decoding.best_of,
    control_tokens: Annotated[
        bool, typer.Option("--control-tokens", help="Let control tokens that are typed in a prompt (<|im_end|>) act; else they are text.")
    ] = False,
    seed: SeedOption = Decoding.seed,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, max=100_000, help=f"Replies written at once; {BATCH_SIZE}, or with vLLM what it can.", show_default=False),
    ] = None,
    engine: Annotated[str, typer.Option(help="builtin, or vllm for large jobs (docs/VLLM.md).")] = "builtin",
    engine_option: Annotated[
        list[str] | None, typer.Option(help="Of vLLM, such as tensor_parallel_size=4; may be repeated.", metavar="NAME=VALUE")
    ] = None,
    device: DeviceOption = "auto",
    device_map: DeviceMapOption = None,
    dtype: DtypeOption = "auto",
    max_harm: MaxHarmOption = None,
    root: RootOption = ARTIFACTS,
    fresh: Annotated[bool, typer.Option("--fresh", help="Replace --out instead of going on.")] = False,
    dry_run: DryRunOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
) -> None:
    """Write replies that carry an emotion: to a text, to stdin, or to every line of a file."""
    if method not in GENERATE:
        raise UsageError(f"unknown method '{method}'{suggest(method, GENERATE)}; expected {', '.join(GENERATE)}")
    chosen = METHODS[method]
    feeling = _feeling(Feeling.of(mix, arc, arc_tokens, fade, personality, vad), strength, method, engine)
    if chosen.kind is not Kind.UNSTEERED and emotion is None and feeling is None:
        raise UsageError(f"--emotion is missing; expected one of {', '.join(EMOTIONS)}, several with commas, or all")
    _check_steering(method, strength, no_examples)
    if fresh and out is None:
        raise UsageError("--fresh replaces --out FILE, and none is named; add it, or leave --fresh out")
    _check_intensity(intensity, strength, method)
    positions = _positions(positions, engine)
    leaning = _guidance(guidance, engine)
    options = engine_options(engine, engine_option, device, device_map)
    _check_processes(text, source, out, auto, engine)
    if dry_run and engine != "builtin":
        raise UsageError("--dry-run times the built-in engine and knows nothing of vLLM; leave one of them out")
    limits = Limits.parse(max_harm) if max_harm else None
    inputs = inputs_of(text, source)

    penalised = penalise_prompt or engine != "builtin"
    decoding = Decoding(max_new_tokens, temperature, top_p, repetition_penalty, seed, leaning, penalised, best_of)
    _check_choosing(decoding, engine)
    from emosteer.base.processes import join
    from emosteer.circuits.places import require_circuit, require_dial
    from emosteer.writing.jobs import jobs_for

    if chosen.asks and emotion is not None and circuit is None:
        parse_emotions(emotion, closed=False)  # a wrong name is reported before the model is loaded
    crew = join()
    loaded = _load(engine, model, device, device_map, dtype, method, control_tokens)
    found: tuple[Circuit, Path] | None = None
    if dry_run and auto and chosen.steers:
        _tell_making(loaded, circuit, root, as_json)
    if chosen.steers:
        found = _circuit_or_made(loaded, circuit, model, root) if auto else require_circuit(loaded, circuit, root)
    elif chosen.asks and circuit is not None:
        found = require_circuit(loaded, circuit, root)
    if found and chosen.vectors is not None:
        found[0].require(chosen.vectors)
    found = _alone(found) if found and (no_examples or engine != "builtin") else found  # an exported model shows none
    if found and (intensity is not None or feeling is not None):
        require_dial(loaded, found, circuit)
    steers = found[0] if found else None
    appended = instruction_for(instruction, steers.instruction if steers else None)
    known = steers.emotions if steers else EMOTIONS
    names = () if emotion is None else parse_emotions(emotion, known, closed=steers is not None)
    if feeling is not None and found:
        feeling.tell_reached(found[0].emotions)
        jobs = _felt_jobs(inputs, feeling.starting(names, intensity), found[0], decoding.max_new_tokens)
        author = _author(loaded, found, decoding, appended, method, batch_size, positions, options)
        warn_of_harm(limits, method, loaded.name, found, jobs, root)
        return write_replies(author, jobs, out, found[1], fresh, dry_run, as_json, crew)
    wanted = (NONE,) if chosen.kind is Kind.UNSTEERED else names
    dialled = {name: steers.strength_at(name, intensity) for name in wanted} if steers and intensity is not None else {}
    jobs = [job for each in inputs for job in jobs_for(each.id, each.group, wanted, method, strength, steers, dialled, each.earlier)]
    author = _author(loaded, found if chosen.steers else None, decoding, appended, method, batch_size, positions, options)
    warn_of_harm(limits, method, loaded.name, found, jobs, root)
    write_replies(author, jobs, out, found[1] if found else None, fresh, dry_run, as_json, crew)


def _check_processes(text: str | None, source: Path | None, out: Path | None, auto: bool, engine: str) -> None:
    """What several processes need: an input that each can read, one file to write, and a circuit that is there."""
    if world() == 1:
        return
    if engine != "builtin":
        raise UsageError("vLLM starts its own processes (--engine-option tensor_parallel_size=4); start it without torchrun")
    if out is None or (source is None and text in (None, "-")) or auto:
        raise UsageError(
            "several processes need --input FILE (or a text) and --out FILE, and a circuit that is there already (no --auto); "
            "start it without torchrun for anything else"
        )


def _check_steering(method: str, strength: float | None, no_examples: bool) -> None:
    """Refuses what only steering knows."""
    if METHODS[method].steers:
        return
    if strength is not None:
        raise UsageError(f"--strength has no meaning with --method {method}")
    if no_examples:
        raise UsageError(f"--no-examples has no meaning with --method {method}: examples stand before what is steered")


def _check_choosing(decoding: Decoding, engine: str) -> None:
    """Refuses candidates where nobody can choose among them."""
    if decoding.chooses and engine != "builtin":
        raise UsageError("replies are chosen among several by the built-in engine alone; leave --best-of out, or use the built-in engine")


def _alone(found: tuple[Circuit, Path]) -> tuple[Circuit, Path]:
    """The circuit without its examples, and its file."""
    return found[0].without_examples(), found[1]


def _check_intensity(intensity: float | None, strength: float | None, method: str) -> None:
    if intensity is not None and strength is None and not METHODS[method].dial:
        dials = " or ".join(name for name in GENERATE if METHODS[name].dial)
        raise UsageError(f"--intensity has no meaning with --method {method}; it belongs to --method {dials}")
    one_of(intensity, strength)


def _feeling(feeling: Feeling | None, strength: float | None, method: str, engine: str) -> Feeling | None:
    """A mixture, an arc, or what changes over turns, once it is sure that it can be had.

    Raises:
        UsageError: with another method than the circuit, with a strength, or with vLLM.
    """
    if feeling is None:
        return None
    if method != CIRCUIT:
        raise UsageError(
            f"--mix, --arc, --fade, --personality and --vad have no meaning with --method {method}; they belong to --method {CIRCUIT}"
        )
    if strength is not None:
        raise UsageError("--mix, --arc, --fade, --personality and --vad go by intensities; leave --strength out")
    if engine != "builtin":
        raise UsageError("vLLM writes one emotion at one strength; leave --mix, --arc, --fade, --personality and --vad out, or the engine")
    feeling.tell_weakened()
    return feeling


def _felt_jobs(inputs: Sequence[Input], feelings: Sequence[Feeling], circuit: Circuit, tokens: int) -> list[Job]:
    from emosteer.judges.reader import Reader
    from emosteer.writing.jobs import felt_job

    read = Reader().shares
    jobs = []
    for each in inputs:
        said = (*each.group.earlier, *each.earlier, Message("user", each.group.text))
        for feeling in feelings:
            now = feeling.now(said, circuit.emotions, read)
            jobs.append(felt_job(each.id, said, now, circuit, tokens, each.group.key))
    return jobs


def _positions(given: str | None, engine: str) -> str:
    found = given or ("all" if engine == "vllm" else "reply")
    if found not in POSITIONS:
        raise UsageError(f"expected --positions to be reply or all, found '{found}'")
    if engine == "vllm" and found != "all":
        raise UsageError(
            "vLLM steers by biases in the weights, which act at all positions; leave --positions out, or use the built-in engine"
        )
    return found


def _guidance(given: float | None, engine: str) -> float:
    """How far replies lean towards the prompt.

    Raises:
        UsageError: with vLLM, which compares no two rows.
    """
    if engine == "builtin":
        return GUIDANCE if given is None else given
    if given not in (None, 1):
        raise UsageError("vLLM writes every reply on its own and cannot guide it; leave --guidance out, or use the built-in engine")
    return 1.0


def _load(engine: str, model: str, device: str, device_map: str | None, dtype: str, method: str, control_tokens: bool) -> Model | Served:
    """What the engine needs of the model: all of it, or for vLLM (which loads it itself) its tokenizer and configuration."""
    if engine == "builtin":
        from emosteer.models.model import Model

        loaded = Model.load(model, device=device, dtype=dtype, device_map=device_map)
        loaded.control_tokens = control_tokens
        return loaded
    from emosteer.base.progress import note
    from emosteer.models.weights.resolve import resolve
    from emosteer.serving.vllm_process import find_python
    from emosteer.serving.vllm_writer import Served, check_method

    check_method(method)
    find_python()  # what is not there is said before anything slow
    return Served.of(resolve(model, progress=note), dtype, control_tokens)


def _circuit_or_made(loaded: Model | Served, given: Path | None, model: str, root: Path) -> tuple[Circuit, Path]:
    from emosteer.api.making import ensure_circuit
    from emosteer.models.model import Model

    return ensure_circuit(loaded, given, root, lambda: loaded if isinstance(loaded, Model) else Model.load(model))


def _tell_making(loaded: Model | Served, given: Path | None, root: Path, as_json: bool) -> None:
    """A dry run of --auto on a model that has no circuit yet: says what making it takes, and ends the command."""
    from emosteer.api.making import cost_of_making
    from emosteer.circuits.places import find_circuit
    from emosteer.models.model import Model

    if isinstance(loaded, Model) and find_circuit(loaded, given, root) is None:
        tell(cost_of_making(loaded, root), as_json)


def _author(
    loaded: Model | Served,
    found: tuple[Circuit, Path] | None,
    decoding: Decoding,
    instruction: str,
    method: str,
    batch_size: int | None,
    positions: str,
    options: Mapping[str, Any],
) -> ReplyWriter:
    from emosteer.models.model import Model
    from emosteer.writing.best_of import chooser_for
    from emosteer.writing.writer import Writer

    if isinstance(loaded, Model):
        chooser = chooser_for(loaded, decoding)
        circuit, rows = found[0] if found else None, batch_size or BATCH_SIZE
        return Writer(loaded, circuit, decoding, instruction, method, rows, positions=positions, chooser=chooser)
    from emosteer.serving.vllm_writer import VllmWriter

    return VllmWriter(loaded, found, decoding, instruction, method, batch_size, options=options)
