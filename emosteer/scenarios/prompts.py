"""Elicitation templates: (text, emotion) -> chat messages. No torch here."""

from __future__ import annotations

from collections.abc import Sequence

from emosteer.base.errors import UsageError, suggest
from emosteer.scenarios.scenarios import Message

#: Appended to every prompt, elicited or not, so that replies stay short and comparable (paper section 3.2 asks the same), and speak to
#: whoever wrote the prompt: told to be brief alone, a small model restates what it was told (docs/CIRCUITS.md, "Other instructions").
INSTRUCTION = "Reply to me as a friend would, in at most two sentences."

#: reply: the assistant turn is a reply that expresses the emotion; tone: the user turn asks for it; system: a system line does;
#: stimulus: nobody asks, but the user turn ends with a sentence that puts the writer in the emotion.
ELICITATIONS = ("reply", "tone", "system", "stimulus")

#: Where steering acts: at the positions that write the reply, or at all (see `steering.SteeringPlan`).
POSITIONS = ("reply", "all")

#: Emotional stimuli in the manner of EmotionPrompt and NegativePrompt: a sentence behind the prompt that gives no instruction. Each
#: says what the event does to the writer and why (its appraisal), in words that do not name the emotion.
STIMULI = {
    "anger": "This makes your blood boil: it is unfair, somebody is to blame, and you will not put up with it.",
    "sadness": "This weighs on your heart: something you cared about is gone, and it will not come back.",
    "happiness": "This makes your heart leap: it is just what you had hoped for, and you could hug everybody in the street.",
    "fear": "This makes your hands shake: something bad may be about to happen, and you cannot get away from it.",
    "surprise": "This takes your breath away: it is the last thing you expected, and you can hardly believe it.",
    "disgust": "This turns your stomach: it is foul and rotten, and you want it far away from you.",
}
_NO_STIMULUS = "This leaves you as you were: it is neither good nor bad for you, and you can think about it at leisure."

Messages = list[dict[str, str]]


def instruction_for(given: str | None, own: str | None) -> str:
    """What is appended to prompts: what was given, else what the circuit carries, else the usual.

    Args:
        given: "" for nothing; own: of the circuit, None where there is none.
    """
    return next(text for text in (given, own, INSTRUCTION) if text is not None)


def plain(text: str, instruction: str = INSTRUCTION, earlier: Sequence[Message] = ()) -> Messages:
    """The prompt without any emotion: what is steered, and the prompt of the `reply` elicitation.

    Args:
        earlier: what was said before the text.
    """
    return continued(earlier, [{"role": "user", "content": f"{text}\n{instruction}".strip()}])


def elicit(elicitation: str, text: str, emotion: str | None, instruction: str = INSTRUCTION, earlier: Sequence[Message] = ()) -> Messages:
    """The messages of an elicitation.

    Args:
        emotion: the emotion to ask for; None asks for a neutral reply in the same words, the baseline for patching.
        earlier: what was said before the text.

    Raises:
        UsageError: for an unknown elicitation.
    """
    wanted = emotion or "neutrality"
    if elicitation == "reply":
        return plain(text, instruction, earlier)
    if elicitation == "tone":
        how = f"strong {emotion}" if emotion else "complete neutrality"
        return plain(f"{text}\nReply to this in a tone of {how}.", instruction, earlier)
    if elicitation == "system":
        return continued(earlier, [{"role": "system", "content": f"Always reply in {wanted}."}, *plain(text, instruction)])
    if elicitation == "stimulus":
        # an emotion of the user's own has no sentence yet: its name must do
        stimulus = STIMULI.get(emotion, f"This fills you with {emotion}, and you cannot help it.") if emotion else _NO_STIMULUS
        return plain(f"{text}\n{stimulus}", instruction, earlier)
    raise UsageError(f"unknown elicitation '{elicitation}'{suggest(elicitation, ELICITATIONS)}; expected {', '.join(ELICITATIONS)}")


def unsaid(
    elicitation: str,
    emotion: str | None,
    instruction: str = INSTRUCTION,
    earlier: Sequence[Message] = (),
    examples: Sequence[Message] = (),
) -> Messages:
    """The messages of an elicitation with nothing said: what guidance leads away from. Of what was said before, only a system line stays
    and the examples: they tell the model how to speak.

    Raises:
        UsageError: for an unknown elicitation.
    """
    system = [message for message in earlier if message.role == "system"]
    return elicit(elicitation, "", emotion, instruction, (*system, *examples))


def continued(earlier: Sequence[Message], last: Sequence[dict[str, str]]) -> Messages:
    """A conversation with the messages of an elicitation as its end; their system line joins the conversation's at its head."""
    messages = [message._asdict() for message in earlier]
    if earlier and last[0]["role"] == "system":
        system, *last = last
        if messages[0]["role"] == "system":
            system = {"role": "system", "content": f"{messages.pop(0)['content']}\n{system['content']}"}
        messages.insert(0, system)
    return [*messages, *last]
