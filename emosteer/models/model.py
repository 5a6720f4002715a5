"""The model adapter: one loaded model, its sites by name, and hooks that are gone when their block ends.

A model is held as two module trees over the same weights. The *plain* tree is the Hugging Face model as loaded: generation
runs on it. The *bridge* is TransformerLens' `TransformerBridge` on a copy of the module tree (parameters shared, no memory
spent): analysis runs on it, and its hook names are what the field knows. Both are proved to agree before they are used (`proof`).
Where TransformerLens has no bridge to a model, analysis hooks the plain tree, which has the same sites.
This is the only module that imports transformer_lens.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import einops
import torch
from torch import Tensor, nn

from emosteer.base.errors import DataError, EmosteerError, ModelError, UsageError, first_line
from emosteer.base.files import sha256_text
from emosteer.base.progress import note
from emosteer.models import chat_templates, tokens
from emosteer.models.architecture import Family, factor_of, family_of, output_matrix, part, shape_of, text_config
from emosteer.models.devices import check_device_map, own_gpus, resolve_device, resolve_dtype, slow_in_bfloat16
from emosteer.models.hooks import Edit, at_home, flat, hooked, reading
from emosteer.models.memory import is_out_of_memory
from emosteer.models.proof import prove, prove_bridge
from emosteer.models.quantised import QUANTISED, Unpacked, keep_differentiable, loading_options, silence
from emosteer.models.sites import ATTN_OUT, MLP_OUT, MLP_POST, RESID_MID, RESID_POST, Site, Z
from emosteer.models.weights.whole import require_finite, scheme_of

_BRIDGE_NAMES = {
    RESID_MID: "hook_resid_mid",
    RESID_POST: "hook_resid_post",
    Z: "attn.hook_z",
    MLP_POST: "mlp.hook_post",
    ATTN_OUT: "attn.o.hook_out",
    MLP_OUT: "mlp.out.hook_out",
}


#: Why some models have no neurons that can be scored or steered.
NO_NEURONS = "its MLPs are mixtures of experts, in which other neurons run for every token"


class Model:
    """A causal language model whose sites can be read and edited.

    Use `Model.load` (name, folder or file) or `Model.from_hf` (a model already in memory). All weights are frozen.
    """

    def __init__(self, hf: Any, tokenizer: Any, name: str, weights_sha256: str) -> None:
        """Wraps a loaded Hugging Face causal LM; prefer `load` or `from_hf`."""
        self.hf = hf.eval().requires_grad_(False)
        keep_differentiable(hf)
        self.tokenizer = tokenizer
        self.name = name
        self.reference = name  # what the user called it; commands in messages use it
        self.sha256 = weights_sha256
        #: Whether control tokens that somebody typed in a prompt act as such; else they are the characters that they are.
        self.control_tokens = False
        self.template = chat_templates.examined(tokenizer, name)
        self.family: Family = family_of(hf)
        self.body: Any = part(hf, self.family.body)
        self.layers: Any = part(self.body, self.family.layers)
        self.config: Any = text_config(hf)
        self.shape = shape_of(self.config, self.layers, self.family)
        #: What everything that a sublayer adds to the stream is multiplied by.
        self.residual_factor = factor_of(self.config, self.family.residual_factor)
        #: How its linear maps are quantised ("int8", "nf4", ...); None where weights are plain. It, too, is analysed on the plain tree.
        self.quantised = scheme_of(hf.config)
        self._unpacked = Unpacked()
        layout = getattr(hf, "hf_device_map", None) or {}
        #: Whether its layers lie on several devices (`--device-map`). The bridge cannot wrap such a model: analysis hooks the plain tree.
        self.spread = len(set(layout.values())) > 1 if self.quantised else bool(layout)
        require_finite(hf, name)
        prove(self)

    # ---- loading -------------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, reference: str, *, device: str = "auto", dtype: str = "auto", device_map: str | None = None) -> Model:
        """Loads a model by hub id, local folder, GGUF file or packaged name (see `emosteer models list`).

        Args:
            device: "auto" (CUDA when there is one), "cpu", "cuda", "cuda:1".
            dtype: "auto" (float32 on CPU, bfloat16 on CUDA), "float32", "bfloat16" or "float16"; or "int8" or "nf4", which hold plain
                weights in 8 or 4 bits and compute as "auto" does.
            device_map: how to lay a model over all GPUs of the machine ("auto", "balanced", "sequential"); needs accelerate.

        Raises:
            UsageError: if it cannot be laid over devices.
            ModelError: if it cannot be found, loaded, or does not prove to be what the adapter expects.
        """
        from transformers import AutoTokenizer
        from transformers.utils import logging as untyped

        from emosteer.models.weights.resolve import resolve
        from emosteer.models.weights.whole import load_whole, packed_by

        target, kind = resolve_device(device), resolve_dtype("auto" if dtype in QUANTISED else dtype, device)
        packing: dict[str, Any] = loading_options(dtype, kind) if dtype in QUANTISED else {}
        layout = {} if device_map is None else {"device_map": check_device_map(device_map, device), **_memory_of(own_gpus())}
        if dtype == "bfloat16" and slow_in_bfloat16(target):
            note("this processor has no units for bfloat16 and computes many times more slowly in it than in float32 (--dtype float32)")
        found = resolve(reference, progress=note)
        packed = bool(packing) or packed_by(found.path, found.name) is not None
        if packed:
            silence()
        if packed and target.type == "cuda" and not layout:
            packing["device_map"] = {"": target}  # packed where it stays: packed weights do not move
        hf_logging: Any = untyped
        hf_logging.set_verbosity_error()
        hf_logging.disable_progress_bar()
        try:
            hf = load_whole(found.path, found.name, dtype=kind, attn_implementation="sdpa", **packing, **layout)
            tokenizer: Any = AutoTokenizer.from_pretrained(found.path, local_files_only=True, trust_remote_code=False)
        except EmosteerError:
            raise
        except Exception as error:  # a foreign folder in the hands of foreign parsers: anything can come
            if is_out_of_memory(error):
                raise
            if "trust_remote_code" in str(error):
                raise ModelError(
                    f"{found.name} is a model that only code from its own folder can load, which emosteer never runs; use a model that "
                    "transformers knows"
                ) from error
            raise ModelError(f"cannot load {found.name} from {found.path}: {first_line(error)}") from error
        if any(weight.is_meta for weight in hf.parameters()):
            raise ModelError(f"{found.name} does not fit on the GPUs of this machine, even together; try --dtype bfloat16 or more GPUs")
        try:
            hf = hf if layout or packed else hf.to(target)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise ModelError(f"{found.name} does not fit in the memory of {target}; try --dtype bfloat16 or --device cpu") from error
            raise
        model = cls(hf, tokenizer, found.name, found.sha256)
        model.reference = reference
        return model

    @classmethod
    def from_hf(cls, hf: Any, tokenizer: Any, name: str = "in-memory") -> Model:
        """Wraps a model already in memory; its hash is taken over the state dict."""
        digest = hashlib.sha256()
        for key, value in sorted(hf.state_dict().items()):
            digest.update(key.encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return cls(hf, tokenizer, name, digest.hexdigest())

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = next(self.hf.parameters()).device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights and activations."""
        dtype: torch.dtype = next(self.hf.parameters()).dtype
        return dtype

    @property
    def precision(self) -> str:
        """In what it is computed, for headers and keys: the dtype, and how weights are quantised, if they are ("torch.float32+nf4")."""
        return f"{self.dtype}+{self.quantised}" if self.quantised else str(self.dtype)

    @property
    def template_sha256(self) -> str:
        """Hash of the chat template's text (of the empty text where the model has none)."""
        return sha256_text(chat_templates.template_of(self.tokenizer))

    @cached_property
    def bridge(self) -> Any:
        """The TransformerBridge over a copy of the module tree that shares every parameter; made and proved on first use."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from transformer_lens.model_bridge import TransformerBridge

            shared = {id(tensor): tensor for tensor in itertools.chain(self.hf.parameters(), self.hf.buffers())}
            tree = copy.deepcopy(self.hf, shared)
            architecture = type(self.hf).__name__
            if not getattr(tree.config, "architectures", None):  # GGUF files do not carry it
                tree.config.architectures = [architecture]
            # The bridge would load the tokenizer once more to make it add a BOS; it is told that this is done. The texts that
            # reach the bridge are token ids already.
            tokenizer = copy.deepcopy(self.tokenizer)
            tokenizer.init_kwargs.update(name_or_path=self.name, add_bos_token=True)
            try:
                bridge = TransformerBridge.boot_transformers(self.name, hf_model=tree, tokenizer=tokenizer, device=str(self.device))
            except Exception as error:
                why = first_line(error).split(". ")[0]  # a list of all that it can wrap may follow
                raise ModelError(f"TransformerBridge cannot wrap {architecture} ({self.name}): {why}") from error
        bridge.original_model.requires_grad_(False)
        self.__dict__["bridge"], self.__dict__["on_bridge"] = bridge, True  # the proof reads through it
        try:
            prove_bridge(self)
        except ModelError:
            del self.__dict__["bridge"], self.__dict__["on_bridge"]
            raise
        return bridge

    @cached_property
    def on_bridge(self) -> bool:
        """Whether analysis runs on the bridge; if not, it hooks the plain tree, whose sites were proved when the model was loaded."""
        reads_pictures = self.config is not self.hf.config  # the bridge would fetch a processor for them from the hub
        other_sites = self.family.parallel or not self.family.has_neurons  # on the bridge
        if self.spread or self.quantised or reads_pictures or other_sites:
            return False
        try:
            return self.bridge is not None
        except ModelError as error:
            why = str(error).removesuffix("; this architecture is not supported")
            note(f"{why}; its sites are hooked in the Hugging Face model instead, as proved at load")
            return False

    # ---- parts and weights by name -------------------------------------------------------------------------------

    @property
    def embedding(self) -> Any:
        """The module that turns token ids into vectors."""
        return part(self.body, self.family.embedding)

    @property
    def final_norm(self) -> Any:
        """The norm between the last layer and the unembedding."""
        return part(self.body, self.family.final_norm)

    @property
    def unembedding(self) -> Any:
        """The linear map from final-normed hidden states to logits."""
        return part(self.hf, self.family.unembedding)

    @property
    def window(self) -> int | None:
        """Positions that layers with sliding-window attention see; None where no window is set."""
        return getattr(self.config, self.family.sliding_window, None) or None  # some write 0 for none

    def w_o(self, layer: int) -> Tensor:
        """Output weights of the heads of a layer. Shape [n_heads, d_head, d_model]."""
        weight = self.matrix(part(self.layers[layer], self.family.w_o))
        return einops.rearrange(weight, "d_model (head d_head) -> head d_head d_model", head=self.shape.n_heads)

    def w_down(self, layer: int) -> Tensor:
        """Output weights of the neurons of a layer. Shape [d_mlp, d_model]."""
        if self.family.w_down is None:
            return torch.zeros(0, self.shape.d_model, device=self.device, dtype=self.dtype)
        return self.matrix(part(self.layers[layer], self.family.w_down)).T

    def matrix(self, linear: Any) -> Tensor:
        """What a linear map of a layer multiplies by, however its weights are kept. Shape [width out, width in]."""
        if self.quantised is not None:
            return self._unpacked.get(linear, self.dtype).to(self.device)
        return output_matrix(linear, self.family).to(self.device)  # moves only where a model is spread

    def refuse_neurons(self, asked: str) -> None:
        """Refuses what asks for neurons of a model that has none.

        Args:
            asked: what asks, for the message.

        Raises:
            UsageError: with the reason.
        """
        if not self.family.has_neurons:
            raise UsageError(f"{asked} asks for neurons of {self.name}, but {NO_NEURONS}; use heads alone")

    def width(self, kind: str) -> int:
        """Size of the last dimension of a site kind."""
        sizes = {Z: self.shape.n_heads * self.shape.d_head, MLP_POST: self.shape.d_mlp}
        return sizes.get(kind, self.shape.d_model)

    # ---- text ----------------------------------------------------------------------------------------------------

    def prompt_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation, ending where the reply begins (`tokens.prompt_ids`)."""
        return self._known(tokens.prompt_ids(self.tokenizer, messages, control=self.control_tokens))

    def text_ids(self, text: str) -> list[int]:
        """Token ids of a text, no special tokens added (`tokens.text_ids`)."""
        return self._known(tokens.text_ids(self.tokenizer, text, control=self.control_tokens))

    def _known(self, ids: list[int]) -> list[int]:
        """The ids, once it is sure that the model has a vector for each: a tokenizer may have been given more tokens than its model.

        Raises:
            DataError: naming the first token that has none.
        """
        rows = self.embedding.weight.shape[0]
        for token in ids:
            if token >= rows:
                name = self.tokenizer.convert_ids_to_tokens(token)
                raise DataError(f"{self.name} has no embedding for the token '{name}' ({token} of {rows}); leave it out of the text")
        return ids

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end a reply: the declared ones and the usual end-of-turn tokens that the vocabulary holds."""
        return tokens.stop_ids(self.tokenizer, self.hf.generation_config.eos_token_id)

    @cached_property
    def token_texts(self) -> Mapping[int, str]:
        """Token id -> its text, without white space round it, of every token that has a vector. Read once: a vocabulary is long."""
        known = sorted({token for token in self.tokenizer.get_vocab().values() if token < self.shape.d_vocab})
        return {token: str(self.tokenizer.decode([token])).strip() for token in known}

    @property
    def pad_id(self) -> int:
        """A token to fill rows with; what it is does not matter, it is masked everywhere."""
        pad, rows = self.tokenizer.pad_token_id, self.embedding.weight.shape[0]
        known = [token for token in (pad, *sorted(self.stop_ids)) if token is not None and token < rows]
        return known[0] if known else 0

    # ---- running and hooking -------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def hooks(self, edits: Mapping[Site, Edit], *, bridge: bool = True) -> Iterator[nn.Module]:
        """Hooks `edits` into one of the two trees for the length of the block and yields the tree's body (no unembedding).

        Whatever happens inside, no hook is left when the block ends.

        Args:
            edits: site -> function of the activation [batch, pos, width].
            bridge: hook the TransformerBridge (analysis), where there is one, or the plain model (generation).
        """
        if self.spread:
            edits = {site: at_home(edit, self.device) for site, edit in edits.items()}
        elif bridge and self.on_bridge:
            named = [(f"blocks.{site.layer}.{_BRIDGE_NAMES[site.kind]}", flat(edit)) for site, edit in edits.items()]
            with self.bridge.hooks(fwd_hooks=named):
                yield part(self.bridge.original_model, self.family.body)
            return
        with contextlib.ExitStack() as stack:
            for site, edit in edits.items():
                stack.enter_context(hooked(self.layers[site.layer], site.kind, edit, self.family))
            yield self.body

    def run(
        self,
        ids: Tensor,
        edits: Mapping[Site, Edit] | None = None,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        bridge: bool = True,
    ) -> Tensor:
        """One forward pass without unembedding.

        Args:
            ids: token ids [batch, pos].
            attention_mask: [batch, pos] of ones and zeros, or an additive mask [batch, 1, pos, pos].

        Returns:
            The final-normed hidden states [batch, pos, d_model] (`logits` takes them). For the raw last residual, read
            the last layer's `resid_post`.
        """
        with self.hooks(edits or {}, bridge=bridge) as body:
            out = body(input_ids=ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False)
        hidden: Tensor = out.last_hidden_state.to(self.device)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Unembeds final-normed hidden states [..., d_model] -> [..., d_vocab]."""
        logits: Tensor = self.unembedding(hidden).to(self.device)
        factor = factor_of(self.config, self.family.logit_factor, self.family.logit_divisor)
        logits = logits if factor == 1 else logits * factor
        cap = getattr(self.config, self.family.logit_softcap, None)
        return torch.tanh(logits / cap) * cap if cap else logits

    def read(self, ids: Tensor, sites: Sequence[Site], **options: Any) -> dict[Site, Tensor]:
        """Activations [batch, pos, width] of the given sites in one forward pass; options as for `run`."""
        store: dict[Site, Tensor] = {}
        edits = dict(options.pop("edits", None) or {})
        for site in sites:
            edits[site] = reading(store, site, edits.get(site))
        self.run(ids, edits, **options)
        return store


def _memory_of(gpus: Sequence[int]) -> dict[str, Any]:
    """Keeps a layout to some GPUs, and on them leaves a tenth of what is free to activations."""
    return {"max_memory": {gpu: int(0.9 * torch.cuda.mem_get_info(gpu)[0]) for gpu in gpus}} if gpus else {}
