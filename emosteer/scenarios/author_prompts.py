"""Prompts for an author: the item and its rules, a theme and a place to start from, and what was wrong with an answer. No torch here."""

from __future__ import annotations

from collections.abc import Sequence

from emosteer.base.chat_endpoint import Message
from emosteer.scenarios.lints import Limits, Problem
from emosteer.scenarios.scenarios import Scenario

#: Fit any domain; `--themes` replaces them.
THEMES = ("colleagues", "people served", "equipment", "schedule", "money", "training", "rules and records", "the way there and back")
#: One per request, in turn, so that two scenarios of a theme do not start from the same idea. A prime number of them.
ANGLES = (
    "a delivery or a handover",
    "a wrong entry in a record",
    "an appointment that may be put off",
    "a request to somebody who decides",
    "a tool in daily use",
    "a sum that is owed",
    "doing a task for the first time",
    "a stranger at the door or on the line",
    "a message that waits for an answer",
    "weather or traffic",
    "an inspection whose result is due",
    "something lost or found",
    "a room or a cupboard that is shared",
    "a promise somebody made last month",
    "a change of plan at short notice",
    "food and drink",
    "the last hour before closing",
)
SHOWN_OPENINGS = 6

SYSTEM = """\
You write short everyday situations for a language study. Each item is one situation and three different things that happened next.

scenario: {scenario[0]} to {scenario[1]} words, first person ("I", "my"). An ordinary situation with a place, a person and one concrete
detail (a number, a time, an object). Something is at stake and nothing says yet how it ends.
positive, neutral, negative: {event[0]} to {event[1]} words each, first person. Each one continues the scenario by itself and does not
know of the other two.
- positive: the outcome is clearly good for me.
- neutral: the matter takes its ordinary course; I gain nothing and lose nothing.
- negative: the outcome is clearly bad for me.

Rules:
- Tell only what a camera or a microphone would record: who did what, what was said, what a letter or a screen showed.
- No word for a feeling or a mood anywhere, not even a denied one (no "happy", "upset", "worried", "relieved", "surprised", "felt",
  "love"), no smiles, tears or shouting, no verdict ("great", "terrible", "unfortunately"), no exclamation mark. The reader must be able
  to guess the feeling from the facts.
- The three outcomes have about the same length and the same amount of detail.
- Write plainly, as a person would tell it. No names of real companies or people.

Answer with one JSON object and nothing else, every value a text:
{{"scenario": "...", "positive": "...", "neutral": "...", "negative": "..."}}"""


def first_messages(domain: str, theme: str, angle: str, taken: Sequence[Scenario], limits: Limits) -> list[Message]:
    """The conversation that asks for one item. taken: scenarios whose likes are not wanted; the latest are shown."""
    lines = [f"Domain: {domain}", f"Theme: {theme}", f"Start from: {angle}"]
    if taken:
        lines += ["", "These openings are taken; choose another place, another person and another object:"]
        lines += [f"- {' '.join(s.text.split()[:14])} ..." for s in taken[-SHOWN_OPENINGS:]]
    system = SYSTEM.format(scenario=limits.scenario_words, event=limits.event_words)
    user = "\n".join([*lines, "", "Write one item for this domain and theme, as JSON."])
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def complain(answer: str, problems: Sequence[Problem]) -> list[Message]:
    """A refused answer and why, to go on with the conversation."""
    reasons = "\n".join(f"- {p.rule}: {p.message}" for p in problems)
    fix = "Write it again with all of this mended (for an emotion word: tell what could be seen or heard instead)."
    user = f"This was refused:\n{reasons}\n{fix} Answer with the JSON object only."
    return [{"role": "assistant", "content": answer[:2000].strip() or "(nothing)"}, {"role": "user", "content": user}]
