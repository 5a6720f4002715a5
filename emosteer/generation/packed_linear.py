"""Linear layers with their weights laid out ahead for small batches on a CPU.

A plain linear layer orders its weights for the matrix units anew in every call, which costs more than the product itself when only
a few tokens go through it. oneDNN can keep the ordered form. It is a copy: memory is spent once, up to `MOST_BYTES`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

#: Copies of larger models are not made: their weights would be held twice.
MOST_BYTES = 3 * 2**30
#: Smaller matrices stay as they are: they live in the processor's cache, and nothing is gained.
LEAST_ENTRIES = 2**16
#: Rows for which the ordered form was measured to be faster, by precision. Larger batches order the weights at little cost.
_ROWS = {torch.float32: range(2, 257), torch.bfloat16: range(1, 513)}


class PackedLinear:
    """One or more linear layers of the same input, their outputs side by side."""

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        """Uses the layers' own weights until `pack` is called."""
        self.linears = tuple(linears)
        self.sizes = [linear.out_features for linear in linears]
        self._packed: Any = None
        self._bias: Tensor | None = None
        self._rows = range(0)

    @property
    def is_packed(self) -> bool:
        """Whether an ordered copy is there."""
        return self._packed is not None

    @property
    def n_bytes(self) -> int:
        """Size of the weights."""
        return sum(linear.weight.nbytes for linear in self.linears)

    def pack(self) -> None:
        """Makes the ordered copy, where it is worth one."""
        first: Tensor = self.linears[0].weight
        if self.is_packed or sum(self.sizes) * first.shape[1] < LEAST_ENTRIES:
            return
        weights: list[Tensor] = [linear.weight for linear in self.linears]
        weight = first if len(weights) == 1 else torch.cat(weights)
        self._bias = joined_bias(self.linears)
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        self._rows = _ROWS[first.dtype]

    def __call__(self, inputs: Tensor, onto: Tensor | None = None) -> Tensor:
        """inputs: [row, in] -> [row, out], plus `onto` [row, out] if given."""
        if len(inputs) in self._rows:
            return self._fast(inputs, onto)
        if inputs.dtype == torch.float32 and len(self.linears) > 1:
            return self._side_by_side(inputs)
        if inputs.dtype == torch.float32 and onto is not None and self.linears[0].bias is None:
            return torch.addmm(onto, inputs, self.linears[0].weight.t())
        outputs = [functional.linear(inputs, linear.weight, linear.bias) for linear in self.linears]
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        return output if onto is None else output.add_(onto)

    def parts(self, inputs: Tensor, room: Tensor | None = None) -> Sequence[Tensor]:
        """The outputs of the layers, one by one; in `room` [layer, row, out] if given, which float32 layers of one size can use."""
        if len(inputs) in self._rows:
            return self._fast(inputs, None).split(self.sizes, dim=-1)
        if room is not None:
            return [_into(part, inputs, linear) for linear, part in zip(self.linears, room, strict=True)]
        return [functional.linear(inputs, linear.weight, linear.bias) for linear in self.linears]

    def _side_by_side(self, inputs: Tensor) -> Tensor:
        """Each layer writes its part of the output; joining them afterwards would copy it."""
        output = inputs.new_empty(len(inputs), sum(self.sizes))
        for linear, part in zip(self.linears, output.split(self.sizes, dim=-1), strict=True):
            _into(part, inputs, linear)
        return output

    def _fast(self, inputs: Tensor, onto: Tensor | None) -> Tensor:
        operation = torch.ops.mkldnn._linear_pointwise
        if onto is None:
            return operation(inputs, self._packed, self._bias, "none", [], "")
        return operation.binary(inputs, onto, self._packed, self._bias, "add")


def joined_bias(linears: Sequence[nn.Linear]) -> Tensor | None:
    """The biases of layers side by side, zero where a layer has none; None if none has one."""
    if all(linear.bias is None for linear in linears):
        return None
    return torch.cat([linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias.detach() for linear in linears])


def _into(output: Tensor, inputs: Tensor, linear: nn.Linear) -> Tensor:
    """Writes what a layer makes of [row, in] into [row, out]."""
    if linear.bias is None:
        return torch.mm(inputs, linear.weight.t(), out=output)
    return torch.addmm(linear.bias, inputs, linear.weight.t(), out=output)


def pack_all(linears: Sequence[PackedLinear], rows: int) -> None:
    """Lays the weights out ahead if that pays for batches of `rows` rows and there is room; otherwise nothing happens."""
    first = linears[0].linears[0].weight
    if first.device.type != "cpu" or rows not in _ROWS.get(first.dtype, ()) or not _available(first.dtype):
        return
    if sum(linear.n_bytes for linear in linears) > MOST_BYTES:
        return
    for linear in linears:
        linear.pack()


def _available(dtype: torch.dtype) -> bool:
    """Whether this build of torch has the operations, and they compute what a linear layer computes."""
    if dtype not in _WORKS:
        _WORKS[dtype] = _works(dtype)
    return _WORKS[dtype]


_WORKS: dict[torch.dtype, bool] = {}


def _works(dtype: torch.dtype) -> bool:
    draw = torch.Generator().manual_seed(0)
    linear = nn.Linear(256, 256).to(dtype).requires_grad_(False)
    linear.weight.copy_(torch.randn(256, 256, generator=draw))
    inputs, onto = (torch.randn(8, 256, generator=draw).to(dtype) for _ in range(2))
    packed = PackedLinear([linear, linear])
    try:
        packed.pack()
        pairs = [(packed(inputs), torch.cat([linear(inputs)] * 2, dim=-1))]
        single = PackedLinear([linear])
        single.pack()
        pairs.append((single(inputs, onto), linear(inputs) + onto))
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    return all(bool((a - b).float().abs().max() <= tolerance * b.float().abs().max()) for a, b in pairs)
