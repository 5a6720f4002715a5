"""Elicitation templates: (text, emotion) -> chat messages. No torch here."""

from __future__ import annotations

from emosteer.errors import UsageError, suggest

#: Appended to every prompt, elicited or not, so that replies stay short and comparable (paper section 3.2 asks the same).
INSTRUCTION = "Keep the reply to at most two sentences."

#: reply: the assistant turn is a reply that expresses the emotion; tone: the user turn asks for it; system: a system line does.
ELICITATIONS = ("reply", "tone", "system")

#: What `generate` can do: steer by a circuit or along the residual stream, just ask, or nothing.
METHODS = ("circuit", "residual", "prompt", "none")

Messages = list[dict[str, str]]


def plain(text: str, instruction: str = INSTRUCTION) -> Messages:
    """The prompt without any emotion: what is steered, and the prompt of the `reply` elicitation."""
    return [{"role": "user", "content": f"{text}\n{instruction}".strip()}]


def elicit(elicitation: str, text: str, emotion: str | None, instruction: str = INSTRUCTION) -> Messages:
    """The messages of an elicitation.

    Args:
        emotion: the emotion to ask for; None asks for a neutral reply in the same words, the baseline for patching.

    Raises:
        UsageError: for an unknown elicitation.
    """
    wanted = emotion or "neutrality"
    if elicitation == "reply":
        return plain(text, instruction)
    if elicitation == "tone":
        how = f"strong {emotion}" if emotion else "complete neutrality"
        return plain(f"{text}\nReply to this in a tone of {how}.", instruction)
    if elicitation == "system":
        return [{"role": "system", "content": f"Always reply in {wanted}."}, *plain(text, instruction)]
    raise UsageError(f"unknown elicitation '{elicitation}'{suggest(elicitation, ELICITATIONS)}; expected {', '.join(ELICITATIONS)}")
