"""The compiled functions as Python calls them. All tensors are float32, contiguous unless said otherwise, and on the processor."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from ctypes import POINTER, c_float, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emosteer.generation.kv_cache import StepCache
from emosteer.generation.native.build import library
from emosteer.generation.packed_linear import joined_bias
from emosteer.generation.prefix_tree import PrefixTree
from emosteer.models.architecture import parts
from emosteer.models.memory import large_pages
from emosteer.models.model import Model

#: Rows of prompts that are read here on any processor. More are left to torch where it has fast products for them.
READ_ROWS = 128
#: Numbers to a line of the processor's cache, at which every matrix begins.
_LINE = 16


class _Matrix(ctypes.Structure):
    _fields_ = [
        ("panels", c_void_p),
        ("bias", c_void_p),
        ("rows", c_void_p * 3),
        ("widths", c_int64 * 3),
        ("depth", c_int64),
        ("width", c_int64),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [("norm1", c_void_p), ("norm2", c_void_p), *((name, _Matrix) for name in ("qkv", "o", "gate", "up", "down"))]


class _Model(ctypes.Structure):
    _fields_ = [
        *((name, c_int64) for name in ("layers", "d_model", "heads", "kv_heads", "d_head", "d_mlp")),
        *((name, c_float) for name in ("epsilon", "epsilon_last", "scale")),
        ("layer", POINTER(_Layer)),
        ("norm", c_void_p),
    ]


class _Batch(ctypes.Structure):
    _fields_ = [
        *((name, c_int64) for name in ("rows", "threads")),
        *((name, c_void_p) for name in ("hidden", "cosines", "sines", "cache")),
        *((name, c_int64) for name in ("layer_stride", "kind_stride", "row_stride", "head_stride")),
        ("begins", c_void_p),
        ("ends", c_void_p),
        ("added", POINTER(c_void_p)),
    ]


class Linears:
    """Up to three linear layers of the same input, their outputs side by side: the layers' own weights, which serve one row, or panels
    of them once `pack` was called, which serve any number."""

    def __init__(self, linears: Sequence[nn.Linear], matrix: Any = None) -> None:
        """matrix: a `_Matrix` inside another structure, to be filled in."""
        self.weights: list[Tensor] = [linear.weight.detach().contiguous() for linear in linears]
        widths = [len(weight) for weight in self.weights]
        self.matrix: Any = _Matrix() if matrix is None else matrix
        self.matrix.depth, self.matrix.width = self.weights[0].shape[1], sum(widths)
        for index, weight in enumerate(self.weights):
            self.matrix.rows[index], self.matrix.widths[index] = weight.data_ptr(), widths[index]
        self.bias = joined_bias(linears)
        self.panels: Tensor | None = None
        if self.bias is not None:
            self.matrix.bias = self.bias.data_ptr()

    @property
    def size(self) -> int:
        """Numbers that the panels take."""
        panel = _panel()
        return int(-(-self.matrix.width // panel) * panel * self.matrix.depth)

    def pack(self, room: Tensor) -> None:
        """Lays the weights out in `room`, of `size` numbers or more."""
        start = 0
        for weight in self.weights:
            _call("pack", weight, *weight.shape, start, room)
            start += len(weight)
        self.panels = room
        self.matrix.panels = room.data_ptr()

    def __call__(self, inputs: Tensor) -> Tensor:
        """inputs: [row, in], one row unless packed -> [row, out]."""
        assert len(inputs) == 1 or self.panels is not None
        output = inputs.new_empty(len(inputs), self.matrix.width)
        _call("linear", ctypes.byref(self.matrix), inputs, len(inputs), output)
        return output


class NativeStep:
    """One more token for every row of a batch, over the weights of a model."""

    def __init__(self, model: Model) -> None:
        """Takes a model of Llama's arithmetic; `lean_forward.lean_of` says which those are."""
        shape, family = model.shape, model.family
        self.is_packed = False
        self.head = Linears([model.unembedding])
        self.linears: list[Linears] = [self.head]
        self.norms: list[Tensor] = []
        self.table = (_Layer * shape.n_layers)()
        paths = {"qkv": family.qkv, "o": (family.w_o,), "gate": family.gate_up[:1], "up": family.gate_up[1:], "down": family.down}
        for entry, layer in zip(self.table, model.layers, strict=True):
            entry.norm1, entry.norm2 = (self._norm(module) for module in parts(layer, family.pre_norms))
            self.linears += [Linears(parts(layer, held), getattr(entry, name)) for name, held in paths.items()]
        self.model = _Model(
            layers=shape.n_layers,
            d_model=shape.d_model,
            heads=shape.n_heads,
            kv_heads=shape.n_kv_heads,
            d_head=shape.d_head,
            d_mlp=shape.d_mlp,
            epsilon=getattr(parts(model.layers[0], family.pre_norms)[0], family.norm_epsilon),
            epsilon_last=getattr(model.final_norm, family.norm_epsilon),
            scale=shape.d_head**-0.5,
            layer=ctypes.cast(self.table, POINTER(_Layer)),
            norm=self._norm(model.final_norm),
        )

    def _norm(self, norm: Any) -> int:
        self.norms.append(norm.weight.detach().contiguous())
        return self.norms[-1].data_ptr()

    @property
    def n_bytes(self) -> int:
        """What all panels take."""
        return 4 * sum(linears.size for linears in self.linears)

    def pack(self) -> None:
        """Lays all weights out ahead, which batches of more than one row need."""
        sizes = [-(-linears.size // _LINE) * _LINE for linears in self.linears]
        room = torch.empty(sum(sizes))
        large_pages(room)
        for linears, part in zip(self.linears, room.split(sizes), strict=True):
            linears.pack(part)
        self.is_packed = True

    def takes(self, rows: int) -> bool:
        """Whether a batch of `rows` rows can be given."""
        return rows == 1 or self.is_packed

    def reads(self, rows: int) -> bool:
        """Whether `rows` tokens of prompts are read faster here than by torch."""
        return self.takes(rows) and (rows <= READ_ROWS or _torch_is_slow())

    def step(
        self, hidden: Tensor, angles: tuple[Tensor, Tensor], cache: StepCache, added: Sequence[tuple[Tensor | None, Tensor | None]]
    ) -> Tensor:
        """Final-normed hidden states [row, d_model]; `hidden` [row, d_model] is overwritten. The cache has made room for the new column.

        Args:
            angles: cosines and signed sines [row, 1, d_head]; added: see `lean_forward.Added`.
        """
        cosines, sines = (angle.contiguous() for angle in angles)
        (begins, ends), block = cache.spans, cache.block
        vectors = [None if vector is None else vector.contiguous() for pair in added for vector in pair]
        batch = _Batch(
            rows=len(hidden),
            threads=torch.get_num_threads(),
            hidden=hidden.data_ptr(),
            cosines=cosines.data_ptr(),
            sines=sines.data_ptr(),
            cache=block.data_ptr(),
            layer_stride=block.stride(0),
            kind_stride=block.stride(1),
            row_stride=block.stride(2),
            head_stride=block.stride(3),
            begins=begins.data_ptr(),
            ends=ends.data_ptr(),
            added=(c_void_p * len(vectors))(*(None if vector is None else vector.data_ptr() for vector in vectors)),
        )
        _library().emosteer_step(ctypes.byref(self.model), ctypes.byref(batch))
        return hidden

    def prompts(self, hidden: Tensor, angles: tuple[Tensor, Tensor], packed: PrefixTree, known: Tensor | None) -> Tensor:
        """Keys (rotated) and values of all nodes of a prefix tree, [layer, 2, node, n_kv_heads, d_head], in one call: what a prefix gives
        does not depend, to the last bit, on what else is read with it.

        Args:
            hidden: embeddings [node that is not known, d_model], overwritten; angles: cosines and signed sines [the same, 1, d_head];
            known: what is known already, as the result, of the known nodes.
        """
        model, nodes, n_known = self.model, len(packed.tokens), packed.n_known
        states = hidden.new_empty(model.layers, 2, nodes, model.kv_heads, model.d_head)
        if known is not None:
            states[:, :, :n_known] = known
        spans = packed.paths, *packed.paths.shape, packed.begins, packed.lengths
        _call("prompts", ctypes.byref(model), hidden, *(angle.contiguous() for angle in angles), nodes, n_known, *spans, states)
        return states


def norm(states: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Root-mean-square norm of states [row, d_model]."""
    output = torch.empty_like(states)
    _call("norm", states, weight, c_float(epsilon), *states.shape, output)
    return output


def gate(opened: Tensor, values: Tensor) -> Tensor:
    """silu(opened) * values, [row, d_mlp]; overwrites `opened`."""
    _call("gate", opened, values, *opened.shape)
    return opened


def rotate(heads: Tensor, count: int, angles: tuple[Tensor, Tensor]) -> None:
    """Rotates the first `count` heads of [row, head, d_head] in place. angles: cosines and signed sines [row, 1, d_head]."""
    rows, n_heads, size = heads.shape
    _call("rotate", heads, *(angle.contiguous() for angle in angles), rows, n_heads, count, size)


def read(queries: Tensor, n_kv_heads: int, packed: PrefixTree, scale: float) -> Tensor:
    """Causal attention within the prompts of a prefix tree. Returns [node, n_heads * d_head].

    Args:
        queries: [node, n_heads, d_head], rotated, the first part of a contiguous [node, query, key and value heads, d_head].
    """
    nodes, n_heads, size = queries.shape
    output = queries.new_empty(nodes, n_heads * size)
    spans = packed.begins, packed.lengths
    _call("read", queries, n_heads, n_kv_heads, size, packed.paths, *packed.paths.shape, *spans, c_float(scale), output)
    return output


def _call(name: str, *arguments: Any) -> None:
    """Calls a function with all threads of torch: tensors as addresses, whole numbers as 64 bits."""
    given = [
        c_void_p(argument.data_ptr()) if isinstance(argument, Tensor) else c_int64(argument) if isinstance(argument, int) else argument
        for argument in (*arguments, torch.get_num_threads())
    ]
    getattr(_library(), f"emosteer_{name}")(*given)


def _library() -> ctypes.CDLL:
    found = library()
    assert found is not None
    return found


@functools.cache
def _torch_is_slow() -> bool:
    """Whether torch multiplies large matrices at half of this processor's speed: MKL on one of AMD's (100 GFLOP/s of 230)."""
    try:
        return torch.backends.mkl.is_available() and "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


@functools.cache
def _panel() -> int:
    compiled = _library()
    compiled.emosteer_panel.restype = c_int64
    return int(compiled.emosteer_panel())
