"""Judges by name: "embedded", "public", "linear", "lm:MODEL", "hf:ID", "openai:MODEL", or several with commas.
Each brings its own libraries, so that they are imported only when asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emosteer.base.cache_folder import cache_dir
from emosteer.base.errors import UsageError, suggest
from emosteer.base.files import slug
from emosteer.judges.protocol import EmotionJudge

#: The panel that comes along; the environment variable that holds an endpoint's key; requests to the endpoint at a time.
EMBEDDED, KEY_ENV, PARALLEL = "embedded", "OPENAI_API_KEY", 8
PANEL = "embedded,public,linear"


@dataclass(frozen=True)
class JudgeOptions:
    """What a judge may be told beside its reference; see `make_judge`."""

    base_url: str | None = None
    key_env: str = KEY_ENV
    cache: Path | None = None
    parallel: int = PARALLEL
    device: str = "auto"


def _tuned(name: str) -> Callable[[str, JudgeOptions], EmotionJudge]:
    def make(reference: str, options: JudgeOptions) -> EmotionJudge:
        from emosteer.judges.adapters import TunedJudge
        from emosteer.judges.embedded import ASSET, shared_encoder
        from emosteer.judges.storage import load_adapter

        adapter = load_adapter(ASSET, name)  # before the encoder, which may have to be fetched
        return TunedJudge.of(shared_encoder(), adapter, name)

    return make


def _linear(reference: str, options: JudgeOptions) -> EmotionJudge:
    from emosteer.judges.embedded import ASSET, LinearJudge, shared_encoder
    from emosteer.judges.storage import load_heads

    head = load_heads(ASSET)["emotion"]
    return LinearJudge(shared_encoder(), head)


def _language_model(reference: str, options: JudgeOptions) -> EmotionJudge:
    from emosteer.judges.language_model import LanguageModelJudge

    return LanguageModelJudge.load(reference, options.device)


def _huggingface(reference: str, options: JudgeOptions) -> EmotionJudge:
    from emosteer.judges.huggingface import HfJudge

    return HfJudge.load(reference, options.device)


def _require_endpoint(reference: str, options: JudgeOptions) -> None:
    if options.base_url is None:
        raise UsageError(f"--judge openai:{reference} needs --base-url: the address of the server, e.g. http://127.0.0.1:8000/v1")
    if options.key_env != KEY_ENV and not os.environ.get(options.key_env):
        raise UsageError(f"the environment variable {options.key_env} that --key-env names is not set")


def _openai(reference: str, options: JudgeOptions) -> EmotionJudge:
    from emosteer.judges.openai import OpenAIJudge

    assert options.base_url is not None  # as `_require_endpoint` has seen to
    file = options.cache if options.cache is not None else cache_dir() / "judges" / f"{slug(reference).replace(':', '-')}.jsonl"
    return OpenAIJudge(options.base_url, reference, key_env=options.key_env, cache=file, parallel=options.parallel)


@dataclass(frozen=True)
class JudgeKind:
    """One row of the table of judges. form: how --judge names it, with a colon where a reference follows; make: (reference, options) ->
    judge; remote: it answers from an endpoint, which has an address, keeps its answers in a file, and costs money or time for each
    opinion, whatever the texts beside it; require: (reference, options) -> raises what is wrong with them."""

    form: str
    make: Callable[[str, JudgeOptions], EmotionJudge]
    remote: bool = False
    require: Callable[[str, JudgeOptions], None] = lambda reference, options: None

    @property
    def takes_reference(self) -> bool:
        """Whether something must follow its colon; else it has no colon."""
        return ":" in self.form


#: Every judge, by the word before the colon.
KINDS = {
    EMBEDDED: JudgeKind(EMBEDDED, _tuned(EMBEDDED)),
    "public": JudgeKind("public", _tuned("public")),
    "linear": JudgeKind("linear", _linear),
    "lm": JudgeKind("lm:MODEL", _language_model),
    "hf": JudgeKind("hf:ID_OR_FOLDER", _huggingface),
    "openai": JudgeKind("openai:MODEL", _openai, remote=True, require=_require_endpoint),
}


def _listed(forms: list[str]) -> str:
    return f"{', '.join(forms[:-1])} or {forms[-1]}" if len(forms) > 1 else forms[0]


JUDGE_FORMS = _listed([kind.form for kind in KINDS.values()])


@dataclass(frozen=True)
class JudgeSpec:
    """A judge as --judge names it. kind: the word before the colon, in lower case; reference: what follows, None without a colon."""

    kind: str
    reference: str | None

    @classmethod
    def parse(cls, text: str) -> JudgeSpec:
        """Takes a specification apart; `known` says whether there is such a judge."""
        kind, colon, reference = text.strip().partition(":")
        return cls(kind.lower(), reference if colon else None)

    @property
    def known(self) -> bool:
        """Whether a judge goes by it: a kind of the table, with a reference exactly where that takes one."""
        kind = KINDS.get(self.kind)
        return kind is not None and (bool(self.reference) if kind.takes_reference else self.reference is None)

    @property
    def remote(self) -> bool:
        """Whether the judge answers from an endpoint (`JudgeKind`)."""
        return self.kind in KINDS and KINDS[self.kind].remote


def specs_of(panel: str) -> list[str]:
    """The judges of a panel: specifications with commas between them.

    Raises:
        UsageError: if there is none, or one twice.
    """
    specs = [spec.strip() for spec in panel.split(",") if spec.strip()]
    if not specs or len({JudgeSpec.parse(spec) for spec in specs}) != len(specs):
        raise UsageError(f"expected one judge or several different ones with commas, found '{panel}'; a judge is {JUDGE_FORMS}")
    return specs


def make_judges(panel: str, **options: Any) -> list[EmotionJudge]:
    """The judges of a panel, each by `make_judge`, which takes the options. Options of an endpoint go to those judges that are one.

    Raises:
        UsageError: if two judges go by one name. UsageError, EmosteerError: as for `make_judge`.
    """
    specs = specs_of(panel)
    remote = [JudgeSpec.parse(spec).remote for spec in specs]
    local = options if not any(remote) else {name: value for name, value in options.items() if name not in ("base_url", "cache")}
    judges = [make_judge(spec, **(options if far else local)) for spec, far in zip(specs, remote, strict=True)]
    names = [judge.name for judge in judges]
    if len(set(names)) != len(names):
        raise UsageError(f"expected judges of different names, found {', '.join(names)}: what they say is kept and counted by name")
    return judges


def require_judges(panel: str, *, base_url: str | None = None, key_env: str = KEY_ENV) -> None:
    """Raises what `make_judges` raises of the specifications alone, and makes none: for commands that load a model first."""
    specs = specs_of(panel)
    remote = [JudgeSpec.parse(spec).remote for spec in specs]
    for spec, far in zip(specs, remote, strict=True):
        _require(spec, JudgeOptions(base_url if far or not any(remote) else None, key_env))


def _require(spec: str, options: JudgeOptions) -> JudgeSpec:
    """A specification that makes sense with its options, taken apart."""
    wanted = JudgeSpec.parse(spec)
    if not wanted.remote and (options.base_url is not None or options.cache is not None):
        remote = _listed([kind.form for kind in KINDS.values() if kind.remote])
        raise UsageError(f"--base-url and --cache have a meaning with --judge {remote} only, found --judge {spec}")
    if not wanted.known:
        bare_id = "/" in spec and wanted.reference is None
        hint = f" (did you mean 'hf:{spec}'?)" if bare_id else suggest(wanted.kind, tuple(KINDS))
        raise UsageError(f"unknown judge '{spec}'{hint}; expected {JUDGE_FORMS}")
    KINDS[wanted.kind].require(wanted.reference or "", options)
    return wanted


def judge_of(judges: Sequence[EmotionJudge]) -> EmotionJudge:
    """Several judges as one panel; a single one as it is."""
    from emosteer.judges.panel import Panel

    return judges[0] if len(judges) == 1 else Panel(tuple(judges))


def close_judges(judges: Sequence[EmotionJudge]) -> None:
    """Lets go of what judges hold, of those that hold anything: connections and files of answers."""
    for judge in judges:
        if hasattr(judge, "close"):
            judge.close()


def make_judge(
    spec: str,
    *,
    base_url: str | None = None,
    key_env: str = KEY_ENV,
    cache: Path | None = None,
    parallel: int = PARALLEL,
    device: str = "auto",
) -> EmotionJudge:
    """Makes the judge that a specification names.

    Args:
        base_url, key_env, parallel: of an OpenAI-compatible endpoint.
        cache: file for its answers; None is a file per model in the cache folder, so that nothing is paid for twice.
        device: of a Hugging Face classifier.

    Raises:
        UsageError: if the specification or an option makes no sense. EmosteerError: if the judge cannot be had.
    """
    options = JudgeOptions(base_url, key_env, cache, parallel, device)
    wanted = _require(spec, options)
    return KINDS[wanted.kind].make(wanted.reference or "", options)
