"""The forward pass of models of Llama's arithmetic without the generality that costs time, for generation only.

It differs from the Hugging Face model in what is done per token, not in what is computed: every distinct prompt prefix once, all
linear layers on packed tokens, keys and values in one growing block, no masks rebuilt, steering vectors added in place; on a CPU weights
laid out ahead for small batches, and in float32 a step that was compiled for the machine (`native`). `lean_of` proves it
against the Hugging Face forward pass before it is used, and gives None for every model that is not exactly of this shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from emosteer.base.progress import note
from emosteer.generation.kv_cache import RowCache, StepCache, cache_name, growing_cache
from emosteer.generation.native import step as native
from emosteer.generation.native.build import library
from emosteer.generation.packed_linear import MOST_BYTES, PackedLinear, pack_all
from emosteer.generation.prefix_tree import PrefixTree, pack
from emosteer.models.architecture import Family, part, parts
from emosteer.models.model import Model
from emosteer.models.sites import ATTN_OUT, MLP_OUT, RESID_POST, Site

#: Rotary variants whose angles do not depend on the length of the sequence.
_ROTARY = ("default", "linear", "llama3", "yarn")
#: layer -> vectors [row, d_model] added after attention and after the MLP; None adds nothing.
Added = Sequence[tuple[Tensor | None, Tensor | None]]


@dataclass(frozen=True, eq=False)
class _Layer:
    """The parts of one decoder layer."""

    norm1: nn.Module
    norm2: nn.Module
    qkv: PackedLinear
    o: PackedLinear
    gate_up: PackedLinear
    down: PackedLinear


def _layer(layer: Any, family: Family) -> _Layer:
    linears = (PackedLinear(parts(layer, paths)) for paths in (family.qkv, (family.w_o,), family.gate_up, family.down))
    return _Layer(*parts(layer, family.pre_norms), *linears)


class Lean:
    """A lean forward pass over the weights of a model; the weights are the model's own."""

    def __init__(self, model: Model) -> None:
        """Takes the model apart; `lean_of` says whether that is allowed."""
        self.model, self.shape = model, model.shape
        self.embed: Tensor = model.embedding.weight
        self.norm, self.epsilon = model.final_norm, model.family.norm_epsilon
        self.layers = [_layer(layer, model.family) for layer in model.layers]
        self.head = PackedLinear([model.unembedding])
        self.scale = self.shape.d_head**-0.5
        self.native: native.NativeStep | None = None
        self._prepared, self._lock = False, Lock()

    def linears(self) -> list[PackedLinear]:
        """All linear maps."""
        return [self.head, *(linear for layer in self.layers for linear in (layer.qkv, layer.o, layer.gate_up, layer.down))]

    def prepare(self, rows: int) -> None:
        """Gets ready for steps of `rows` rows: the compiled step where there is one, or else weights laid out ahead where that pays.

        Safe to call from several threads: a compiled step is shown to others once it is proved.
        """
        with self._lock:
            if not self._prepared:
                self._prepared = True
                if self.model.device.type == "cpu" and self.model.dtype == torch.float32 and library() is not None:
                    self.native = self._if_equal(native.NativeStep(self.model), 1)
            if self.native is None:
                pack_all(self.linears(), rows)
            elif rows > 1 and not self.native.is_packed and self.native.n_bytes <= MOST_BYTES:
                self.native.pack()
                self.native = self._if_equal(self.native, 3)

    @torch.no_grad()
    def _if_equal(self, compiled: native.NativeStep, rows: int) -> native.NativeStep | None:
        """The compiled step if it, and reading by the same functions, compute what torch computes."""
        draw = torch.Generator().manual_seed(rows)
        lengths = [3 + row for row in range(rows)]
        cache = RowCache(self.shape, lengths, 2, self.model.device, self.model.dtype)
        cache.block.copy_(torch.randn(cache.block.shape, generator=draw))
        tokens = torch.randint(self.shape.d_vocab, (rows,), generator=draw)
        added = self.added({Site(0, ATTN_OUT): torch.randn(rows, self.shape.d_model, generator=draw)})
        prompts = torch.randint(self.shape.d_vocab, (rows, 9), generator=draw)
        prompts[1:, :4] = prompts[:1, :4]
        packed, found = pack(prompts.tolist(), 9, self.model.device), []
        for way in (None, compiled):
            trial, states = copy(self), list[Tensor]()
            trial.native, cache.end = way, cache.width
            trial.read(packed, lambda _, *kept, states=states: states.extend(part.clone() for part in kept))
            found.append((trial.logits(trial.step(tokens, torch.tensor(lengths), cache, added)), torch.stack(states[-2:])))
        if all(agree(one, other) for one, other in zip(found[1], found[0], strict=True)):
            return compiled
        note("the compiled writing step does not compute what torch computes here; torch's own is used, which is slower")
        return None

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines [token, 1, d_head] by the model's own rotary module."""
        assert self.model.family.rotary is not None  # `_recognised` asks for it
        cos, sin = part(self.model.body, self.model.family.rotary)(self.embed[:1], positions[None])
        half = self.shape.d_head // 2
        return cos[0, :, None], torch.cat((-sin[0, :, None, :half], sin[0, :, None, half:]), dim=-1)

    def _normed(self, norm: Any, hidden: Tensor) -> Tensor:
        """Root-mean-square norm, statistics in float32 as Hugging Face takes them."""
        epsilon = getattr(norm, self.epsilon)
        if self.native is not None:
            return native.norm(hidden, norm.weight, epsilon)
        if hidden.dtype == torch.float32:
            return functional.rms_norm(hidden, hidden.shape[-1:], norm.weight, epsilon)
        wide = hidden.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
        return norm.weight * wide.to(hidden.dtype)

    def _queries(self, layer: _Layer, hidden: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys (both rotated) and values [token, head, d_head]."""
        shape = self.shape
        heads = layer.qkv(self._normed(layer.norm1, hidden)).view(len(hidden), -1, shape.d_head)
        if self.native is not None:
            native.rotate(heads, shape.n_heads + shape.n_kv_heads, angles)
            return heads.split((shape.n_heads, shape.n_kv_heads, shape.n_kv_heads), dim=1)
        turned, values = heads[:, : -shape.n_kv_heads], heads[:, -shape.n_kv_heads :]
        turned = torch.addcmul(turned * angles[0], turned.roll(shape.d_head // 2, -1), angles[1])
        return turned[:, : shape.n_heads], turned[:, shape.n_heads :], values

    def _rest(
        self, layer: _Layer, hidden: Tensor, z: Tensor, added: tuple[Tensor | None, Tensor | None], room: Tensor | None = None
    ) -> Tensor:
        """What follows attention in a layer. hidden, result: [token, d_model]; room: [2, token, d_mlp], to be written over."""
        hidden = layer.o(z, hidden)
        if added[0] is not None:
            hidden += added[0]
        gate, up = layer.gate_up.parts(self._normed(layer.norm2, hidden), room)
        gated = functional.silu(gate, inplace=True).mul_(up) if self.native is None else native.gate(gate, up)
        hidden = layer.down(gated, hidden)
        if added[1] is not None:
            hidden += added[1]
        return hidden

    def read(self, packed: PrefixTree, keep: Callable[[int, Tensor, Tensor], None], known: Tensor | None = None) -> None:
        """Computes keys and values [node, n_kv_heads, d_head] of every distinct prefix and gives them to `keep(layer, keys, values)`.

        Args:
            known: keys and values of the tree's known nodes, [layer, 2, node, n_kv_heads, d_head]; they are handed on with the others.
        """
        n_known, shape = packed.n_known, self.shape
        if self._reads_compiled(packed):
            for index, (keys, values) in enumerate(self.states(packed, known)):
                keep(index, keys, values)
            return
        hidden, angles = self.embed[packed.tokens[n_known:]], self.rotary(packed.positions[n_known:])
        n_paths, width = packed.paths.shape
        # One room for all layers: memory that is given back and asked for again has to be cleared by the system every time.
        room = hidden.new_empty(2, len(hidden), shape.d_mlp) if self.native is not None else None
        for index, layer in enumerate(self.layers):
            states = list(self._queries(layer, hidden, angles))
            if known is not None:
                before = (hidden.new_zeros(n_known, shape.n_heads, shape.d_head), *known[index])
                states = [torch.cat(pair) for pair in zip(before, states, strict=True)]
            queries, keys, values = states
            keep(index, keys, values)
            if index + 1 == len(self.layers):
                return  # the last layer's output is not needed
            if self.native is not None and known is None:
                z = native.read(queries, shape.n_kv_heads, packed, self.scale)
            else:
                q, k, v = (part[packed.paths].transpose(1, 2) for part in states)
                z = functional.scaled_dot_product_attention(
                    q, k, v, is_causal=True, scale=self.scale, enable_gqa=shape.n_kv_heads < shape.n_heads
                )
                z = z.transpose(1, 2).reshape(n_paths * width, -1)[packed.place[n_known:]]
            hidden = self._rest(layer, hidden, z, (None, None), room)

    def states(self, packed: PrefixTree, known: Tensor | None = None) -> Tensor:
        """What `read` computes, of all layers at once: [layer, 2, node, n_kv_heads, d_head]. Argument as for `read`."""
        if self._reads_compiled(packed):
            assert self.native is not None
            fresh, positions = packed.tokens[packed.n_known :], packed.positions[packed.n_known :]
            return self.native.prompts(self.embed[fresh], self.rotary(positions), packed, known)
        layers: list[Tensor] = []
        self.read(packed, lambda _, keys, values: layers.append(torch.stack([keys, values])), known)
        return torch.stack(layers)

    def _reads_compiled(self, packed: PrefixTree) -> bool:
        return self.native is not None and self.native.reads(len(packed.tokens) - packed.n_known)

    def step(self, tokens: Tensor, positions: Tensor, cache: StepCache, added: Added) -> Tensor:
        """One more token per row. tokens, positions: [row]. Returns final-normed hidden states [row, d_model]."""
        mask = cache.advance()
        if self.native is not None and self.native.takes(len(tokens)):
            return self.native.step(self.embed[tokens], self.rotary(positions), cache, added)
        return self._step(tokens, positions, cache.write, mask, added)

    def fixed_step(self, tokens: Tensor, positions: Tensor, block: Tensor, column: Tensor, mask: Tensor, added: Added) -> Tensor:
        """`step` with shapes that do not change from token to token, which a recording needs: attention over all columns of a cache's
        block, of which `mask` [row, 1, 1, pos] hides some; the new one is `column` [1]."""

        def write(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            k, v = block[layer]
            return k.index_copy_(2, column, keys[:, :, None]), v.index_copy_(2, column, values[:, :, None])

        return self._step(tokens, positions, write, mask, added)

    def _step(
        self,
        tokens: Tensor,
        positions: Tensor,
        write: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]],
        mask: Tensor | None,
        added: Added,
    ) -> Tensor:
        """write: takes a layer's new keys and values, and returns all of them, [row, n_kv_heads, pos, d_head]."""
        hidden, angles, shape = self.embed[tokens], self.rotary(positions), self.shape
        grouped = (len(tokens), shape.n_kv_heads, -1, shape.d_head)
        for index, layer in enumerate(self.layers):
            queries, keys, values = self._queries(layer, hidden, angles)
            k, v = write(index, keys, values)
            z = functional.scaled_dot_product_attention(queries.reshape(grouped), k, v, attn_mask=mask, scale=self.scale)
            hidden = self._rest(layer, hidden, z.reshape(len(tokens), -1), added[index])
        return self._normed(self.norm, hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """Unembeds final-normed hidden states [row, d_model]."""
        if self.native is not None and self.native.takes(len(hidden)):
            return self.native.head(hidden)
        return self.head(hidden) if self.head.is_packed else self.model.logits(hidden)

    def added(self, vectors: Mapping[Site, Tensor]) -> Added:
        """Steering vectors by layer; what is added to the MLP's output and to the layer's is one sum."""
        table: list[tuple[Tensor | None, Tensor | None]] = []
        for layer in range(self.shape.n_layers):
            mlp, post = vectors.get(Site(layer, MLP_OUT)), vectors.get(Site(layer, RESID_POST))
            late = mlp + post if mlp is not None and post is not None else mlp if post is None else post
            table.append((vectors.get(Site(layer, ATTN_OUT)), late))
        return table


def lean_of(model: Model) -> Lean | None:
    """The model's lean forward pass, proved; None where the Hugging Face forward pass must be used.

    It is made once per model and made again if a weight has changed since.
    """
    if not _recognised(model):
        return None
    found: tuple[Any, Lean | None] | None = model.__dict__.get("_lean")
    state = _state(model)
    if found is None or found[0] != state:
        lean = Lean(model)
        found = model.__dict__["_lean"] = (state, lean if _proved(lean) else None)
    return found[1]


def _state(model: Model) -> list[tuple[int, int]]:
    """Changes when a weight is replaced or written to."""
    return [(weight.data_ptr(), weight._version) for weight in model.hf.parameters()]


def _recognised(model: Model) -> bool:
    """Whether the modules are exactly those whose arithmetic `Lean` repeats, with nothing hooked into them."""
    hf, config, family = model.hf, model.config, model.family
    if (
        not _repeats(family)
        or model.window is not None
        or any(getattr(config, name, None) for name in (family.logit_softcap, family.attn_softcap))
    ):
        return False
    kinds = set(getattr(config, "layer_types", None) or ("full_attention",))
    rotary = part(model.body, family.rotary) if family.rotary else None
    if kinds != {"full_attention"} or config.hidden_act != "silu" or getattr(rotary, "rope_type", "") not in _ROTARY:
        return False
    if getattr(hf, "hf_device_map", None) or not all(_is_plain(layer, model) for layer in model.layers):
        return False
    plain_ends = type(model.unembedding) is nn.Linear and type(model.embedding) is nn.Embedding and _is_of(hf, model.final_norm)
    return plain_ends and not any(module._forward_hooks or module._forward_pre_hooks for module in hf.modules())


def _repeats(family: Family) -> bool:
    """Whether `Lean` has the arithmetic of a family: norms before both sublayers and nowhere else, separate matrices, nothing scaled."""
    norms = len(family.pre_norms) == 2 and not family.post_norms and not family.qk_norms
    matrices = len(family.qkv) == 3 and len(family.gate_up) == 2
    scaled = family.norm_offset or family.embedding_is_scaled or family.residual_factor or family.logit_factor or family.logit_divisor
    blocks = family.has_neurons and not family.parallel and not family.transposed
    return family.is_complete and norms and matrices and blocks and not scaled


def _is_plain(layer: Any, model: Model) -> bool:
    """Whether a layer has the parts that its description speaks of, none of them exchanged, and attends without a window."""
    family, attention = model.family, part(layer, model.family.attention)
    if not all(_is_of(model.hf, held) for held in (attention, *parts(layer, (family.mlp, *family.pre_norms)))):
        return False
    linears = parts(layer, (*family.qkv, family.w_o, *family.gate_up, *family.down))
    if any(type(linear) is not nn.Linear for linear in linears) or getattr(attention, family.attn_window, None):
        return False
    scale: float = getattr(attention, family.attn_scale)
    return scale == model.shape.d_head**-0.5


def _is_of(hf: Any, held: Any) -> bool:
    """Whether a part's class comes from the file that defines the model's class: the code that was read for the description."""
    return type(held).__module__ == type(hf).__module__


@torch.no_grad()
def _proved(lean: Lean) -> bool:
    """Whether logits agree with the Hugging Face forward pass: prompts of different lengths that begin alike, and two tokens more."""
    model, vocab = lean.model, lean.shape.d_vocab
    draw = torch.Generator().manual_seed(0)
    whole = torch.randint(vocab, (3, 12), generator=draw)
    whole[1, :6] = whole[0, :6]
    starts = (0, 0, 4)  # the third row is shorter
    whole, mask = whole.to(model.device), torch.ones(3, 12, dtype=torch.long, device=model.device)
    mask[2, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    usual_cache = {cache_name(model.body): growing_cache(model.hf.config)}
    usual = model.body(input_ids=whole, attention_mask=mask, position_ids=positions, **usual_cache)
    expected = model.logits(usual.last_hidden_state[:, 9:])
    prompts = [whole[row, start:9].tolist() for row, start in enumerate(starts)]
    cache = RowCache(lean.shape, [len(prompt) for prompt in prompts], 3, model.device, model.dtype)
    packed = pack(prompts, cache.width, model.device)
    lean.read(packed, lambda layer, keys, values: cache.fill(layer, range(3), packed.rows, keys, values))
    added = lean.added({})
    found = torch.stack([lean.logits(lean.step(whole[:, at], positions[:, at], cache, added)) for at in range(9, 12)], dim=1)
    return agree(found, expected)


def agree(found: Tensor, expected: Tensor) -> bool:
    """Whether two ways of the same computation, of one precision, differ by no more than rounding."""
    # In half precision two orders of the same sums differ by 4 to 6 % of the logits' spread on a real model; an error in the arithmetic
    # gives differences as large as the spread.
    tolerance = 1e-4 if expected.dtype == torch.float32 else 0.2
    error = (found - expected).float().square().mean().sqrt()
    return bool(error <= tolerance * expected.float().std())
