"""What can be read in a reply: its emotion by a judge, whether it is sound, how surprised the plain model is at each token, and how far the
plain model's state lies along each emotion there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from emosteer.base.errors import EmosteerError, first_line
from emosteer.judges.reader import Reader
from emosteer.models.model import Model
from emosteer.models.sites import RESID_POST, Site
from emosteer.models.tokens import INCOMPLETE
from emosteer.scenarios.prompts import instruction_for, plain
from emosteer.serving.asking import Served, said
from emosteer.serving.errors import RequestError, refusing
from emosteer.serving.requests import ReadingRequest

#: Positions of a reply whose logits are computed together.
TOGETHER = 64
#: Tokens that are decoded together at most while characters stay incomplete; of those, as many as are decoded again. A character has at
#: most four bytes, so that nothing before these can still be completed.
MOST_DECODED, DECODED_AGAIN = 32, 16


@dataclass(frozen=True)
class TokenReading:
    """One token of a reply, as the plain model reads it. surprise: nats; along: emotion -> the state's part along its direction, averaged
    over the layers of residual steering, in units of each layer's root mean square."""

    text: str
    surprise: float
    along: dict[str, float]


@torch.no_grad()
def read_tokens(served: Served, prompt: Sequence[int], reply: Sequence[int]) -> list[TokenReading]:
    """Every token of a reply after its prompt, read without steering."""
    model, circuit = served.model, served.circuit
    ids = torch.tensor([[*prompt, *reply]], device=model.device)
    sites = [Site(layer, RESID_POST) for layer in circuit.residual_layers]
    states: dict[Site, Any] = {}

    def keep(site: Site) -> Callable[[torch.Tensor], None]:
        return lambda activation: states.__setitem__(site, activation[0, len(prompt) :].float().cpu())

    hidden = model.run(ids, {site: keep(site) for site in sites}, bridge=False)
    # a few positions at a time: a table over the vocabulary for all of a long reply would be large
    parts = zip(hidden[0, len(prompt) - 1 : -1].split(TOGETHER), ids[0, len(prompt) :, None].split(TOGETHER), strict=True)
    surprise = torch.cat([-model.logits(states).float().log_softmax(-1).gather(1, tokens)[:, 0] for states, tokens in parts])
    along = torch.zeros(len(reply), len(circuit.emotions))
    for site, state in states.items():
        along += state @ circuit.vectors[:, site.layer].float().T / circuit.rms[site.layer].float()
    along /= max(1, len(sites))
    texts = pieces_of(model, reply)
    rows = zip(texts, surprise.tolist(), along.tolist(), strict=True)
    return [TokenReading(text, nats, dict(zip(circuit.emotions, row, strict=True))) for text, nats, row in rows]


def pieces_of(model: Model, ids: Sequence[int]) -> list[str]:
    """The text that each token adds; together they are the whole. A character of several tokens comes with its last.

    Decoded are only the tokens since the last but one behind which all characters were complete: what a token reads as may depend on the
    one before it, and no further.
    """
    pieces, start, complete, told = list[str](), 0, 0, ""  # told: what was said of the text of the tokens from `start` on
    for end in range(1, len(ids) + 1):
        whole = _decoded(model, ids[start:end])
        shown = whole if end == len(ids) else whole.rstrip(INCOMPLETE)
        if shown == whole:
            pieces.append(shown[len(told) :])
            start, complete = complete, end
            told = _decoded(model, ids[start:end])
        elif end - start >= MOST_DECODED:
            last = _decoded(model, ids[end - DECODED_AGAIN : end])
            pieces.append(whole[len(told) : len(whole) - len(last) + len(last.rstrip(INCOMPLETE))])
            start = complete = end - DECODED_AGAIN
            told = last.rstrip(INCOMPLETE)
        else:
            pieces.append(shown[len(told) :])
            told = max(told, shown, key=len)
    return pieces


def _decoded(model: Model, ids: Sequence[int]) -> str:
    return str(model.tokenizer.decode(list(ids)))


def reading_of(served: Served, reader: Reader, wanted: ReadingRequest) -> Callable[[], dict[str, Any]]:
    """The work that a request to /v1/readings asks for, to be done where the model is free.

    Raises:
        RequestError: for a conversation or a reply that is none, or one that is too long.
    """
    messages = said([message.plain() for message in wanted.messages])
    if not wanted.reply.strip():
        raise RequestError("the reply is empty", param="reply")
    instruction = instruction_for(wanted.instruction, served.circuit.instruction)
    with refusing("messages"):
        prompt = served.model.prompt_ids(plain(messages[-1].content, instruction, messages[:-1]))
    with refusing("reply"):
        reply = served.model.text_ids(wanted.reply)
    if len(prompt) + len(reply) > served.model.shape.context:
        raise RequestError(
            f"prompt and reply have {len(prompt) + len(reply)} tokens, more than {served.name} has positions for",
            param="reply",
            code="context_length_exceeded",
        )

    def work() -> dict[str, Any]:
        tokens = read_tokens(served, prompt, reply)
        found: dict[str, Any] = {"judge": None, "sound": None, "problem": None}
        try:
            judge, check = reader.judges()
            opinion, sound = judge.opinions([wanted.reply])[0], check.check([wanted.reply])[0]
            found["sound"] = sound.sound
            if opinion.probabilities is None:  # the judge was there, but its call failed
                found["problem"] = opinion.problem or "no reason given"
            else:
                found["judge"] = {"name": judge.name, "label": opinion.emotion(), "probabilities": opinion.probabilities}
        except (EmosteerError, OSError) as error:  # no judge is at hand; what the model itself reads is still told
            found["problem"] = first_line(error)
        return {"object": "reading", **found, "tokens": [vars(token) for token in tokens]}

    return work
