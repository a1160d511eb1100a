"""The weights that a rollout multiplies by: as they are, packed for the CPU's matrix product, or in 8 bits.

A weight is replaced by an object that answers for it (`models.stand_in`); no family knows. What is replaced
is made anew in every call of the sampler: there is no copy that an update of the parameters could leave
behind. Low-rank adapters are merged first, so that sampling costs what it costs without them.

Milliseconds of all products of GPT-2 124M (blocks + unembedding), two cores with AVX-512 and AMX:

    rows    as they are     oneDNN        packed         int8
       1      12 +  5      17 +  5       13 +  4        7 + 1
       4      22 + 10      17 +  6       14 +  5        8 + 1
       8      25 + 17      19 +  7       14 +  5        9 + 1
      32      39 + 18      35 + 13       17 +  7       12 + 2
     128      70 + 35      74 + 34       55 + 20       21 + 9

Reading the weights takes 12 + 5 ms; at 32 rows torch's large products would take 18 + 8.
"""

from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from minirlhf.kernels import cpu, products
from minirlhf.kernels.memory import Room
from minirlhf.models.adapters import adapted_layers, merged
from minirlhf.models.interface import Params
from minirlhf.models.stand_in import StandIn

Weights = Callable[[Params, int, int], Params]
"""(parameters, slots, most tokens of a response) -> the parameters to sample with."""

_SMALLEST = 2**18  # entries; below, calling costs more than the better product saves
_FEWEST_SLOTS = 2  # below, the plain product was as fast
_PACKED_STEPS = 16  # packing costs about as much as it saves in five steps
_MOST_ROWS = 256  # of one product; above, one that splits the weights as it goes is faster
_ROUNDED = {torch.float32, torch.bfloat16, torch.float64}
_MOST_ONEDNN = 128  # slots, from which torch's own was as fast as oneDNN's packed one


def as_they_are(params: Params, slots: int, steps: int) -> Params:
    """The parameters themselves, adapters beside their weights."""
    return params


def fastest(params: Params, slots: int, steps: int) -> Params:
    """The same numbers in the layout that the CPU's matrix product likes best, where that pays.

    The product is `kernels.cpu`'s where that can be built, otherwise oneDNN's. Packed products sum in another
    order: logits differ by rounding, as between batch sizes. Adapters are merged, but not in 16 bits: there
    W + ΔW would lose most of a small ΔW to rounding, and be another law than the trainer's.
    """
    params = merged(params) if _merges(params) else params
    if not _packing_pays(_first(params).device, slots, steps):
        return params
    if cpu.available():
        room = Room("packed weights", _packed_bytes(params))
        return _replaced(params, partial(Packed, room=room), {torch.float32})
    return _replaced(params, partial(Reordered, rows=slots), {torch.float32})


class Copies(NamedTuple):
    """Bytes of a rollout's own weights: in a room, which goes when nothing uses it; on the heap; and, on the
    heap too, weights with their adapters added in."""

    room: int = 0
    heap: int = 0
    merged: int = 0


def copies_of(weights: Weights, params: Params, slots: int, steps: int, device: torch.device) -> Copies:
    """What `weights`, one of this page, would make of parameters of these shapes on this device."""
    merges = weights is int8 or (weights is fastest and _merges(params))
    dense = sum(layer.weight.nbytes for layer in adapted_layers(params).values()) if merges else 0
    if weights is int8:
        sizes = [leaf.numel() for leaf in tree_leaves(params) if _to_replace(leaf, _ROUNDED)]
        # While one is made: itself over its scales in fp32, and its bytes before they are packed.
        return Copies(heap=sum(sizes) + 5 * max(sizes, default=0), merged=dense)
    if weights is not fastest or not _packing_pays(device, slots, steps):
        return Copies(merged=dense)
    if cpu.available():
        return Copies(room=_packed_bytes(params), merged=dense)
    replaced = [leaf.nbytes for leaf in tree_leaves(params) if _to_replace(leaf, {torch.float32})]
    return Copies(heap=sum(replaced), merged=dense)


def _first(params: Params) -> Tensor:
    return next(leaf for leaf in tree_leaves(params) if isinstance(leaf, Tensor))


def _merges(params: Params) -> bool:
    return _first(params).dtype.itemsize > 2


def _packing_pays(device: torch.device, slots: int, steps: int) -> bool:
    if device.type != "cpu" or slots < _FEWEST_SLOTS or steps < _PACKED_STEPS:
        return False
    return cpu.available() or (slots <= _MOST_ONEDNN and torch.backends.mkldnn.is_available())


def _packed_bytes(params: Params) -> int:
    sizes = [leaf.shape for leaf in tree_leaves(params) if _to_replace(leaf, {torch.float32})]
    # Which side is the input shows at the first product.
    entries = sum(max(cpu.packed_size(a, b), cpu.packed_size(b, a)) + 16 for a, b in sizes)
    return entries * torch.float32.itemsize


def int8(params: Params, slots: int, steps: int) -> Params:
    """8-bit weights with a scale per output, and 8-bit inputs with a scale per row, as they come.

        y = s_x s_w Σ_i round(x_i / s_x) round(w_i / s_w),   s = max|·| / 127

    Dettmers et al. 2022 (arXiv:2208.07339), §2.1, without the outlier path. The law is another one than that
    of the parameters: a rollout records what it really drew from, and a trainer has to correct for it. A row
    is quantised by itself, so it does not depend on its batch mates. Biases, norms, attention and embeddings
    keep their precision.
    """
    return _replaced(merged(params), Int8, _ROUNDED)


class _Prepared(StandIn):
    """A weight that is made into something else at its first product, and multiplied in that form."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        self.by_output: dict[bool, Any] = {}  # whether stored [out, in] -> what `prepare` made of it

    def product(self, x: Tensor, bias: Tensor | None, *, outputs_first: bool) -> Tensor:
        if outputs_first not in self.by_output:
            self.by_output[outputs_first] = self.prepare(self.weight if outputs_first else self.weight.T)
        rows = x.reshape(-1, x.shape[-1])
        return self.multiply(rows, self.by_output[outputs_first], bias).view(*x.shape[:-1], -1)

    @abstractmethod
    def prepare(self, matrix: Tensor) -> Any:
        """What products need of the matrix [out, in]."""

    @abstractmethod
    def multiply(self, x: Tensor, prepared: Any, bias: Tensor | None) -> Tensor:
        """x [N, in] -> [N, out]."""


class Packed(_Prepared):
    """Panels of the width of the processor's registers; see kernels/native/product.cpp and tiles.cpp."""

    def __init__(self, weight: Tensor, *, room: Room) -> None:
        super().__init__(weight)
        self.room = room

    def product(self, x: Tensor, bias: Tensor | None, *, outputs_first: bool) -> Tensor:
        if x.numel() // x.shape[-1] <= _MOST_ROWS:
            return super().product(x, bias, outputs_first=outputs_first)
        return products.linear(x, self.weight if outputs_first else self.weight.T, bias)

    def prepare(self, matrix: Tensor) -> cpu.PackedMatrix:
        width, depth = matrix.shape
        return cpu.packed(matrix.T, self.room.take((cpu.packed_size(depth, width),)))

    def multiply(self, x: Tensor, prepared: cpu.PackedMatrix, bias: Tensor | None) -> Tensor:
        return cpu.product(x, prepared, bias)


class Reordered(_Prepared):
    """oneDNN's blocked layout, chosen for `rows` rows."""

    def __init__(self, weight: Tensor, *, rows: int) -> None:
        super().__init__(weight)
        self.rows = rows

    def prepare(self, matrix: Tensor) -> Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(matrix.contiguous(), self.rows)

    def multiply(self, x: Tensor, prepared: Tensor, bias: Tensor | None) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, prepared, bias, "none", [], "")


class Int8(_Prepared):
    """Rounded to 8 bits; see `int8`."""

    def prepare(self, matrix: Tensor) -> tuple[Any, Tensor, Tensor]:
        quantised, scale = _rounded(matrix.float())
        quantised = quantised.contiguous()  # a quarter of the bytes to turn around
        if matrix.device.type == "cpu":
            nothing = torch.zeros(len(matrix), dtype=torch.int64)
            return torch.ops.onednn.qlinear_prepack(quantised, None), scale[:, 0].contiguous(), nothing
        return quantised, scale[:, 0], quantised.new_zeros(0)

    def multiply(self, x: Tensor, prepared: tuple[Any, Tensor, Tensor], bias: Tensor | None) -> Tensor:
        weight, scale, zero_points = prepared
        rows, row_scale = _rounded(x.float())
        if x.device.type == "cpu":
            product = torch.ops.onednn.qlinear_pointwise(
                rows, 1.0, 0, weight, scale, zero_points, None, 1.0, 0, torch.float32, "none", [], ""
            )
        else:  # the same numbers: sums of products of integers below 2²⁴ are exact in fp32 up to 1,040 inputs
            product = (rows.float() @ weight.float().T) * scale
        product = (product * row_scale).to(x.dtype)
        return product if bias is None else product + bias


def _rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [N, D] and the scale of each row [N, 1]; a row of zeros has scale 1."""
    scale = rows.abs().amax(-1, keepdim=True) / 127
    scale = torch.where(scale > 0, scale, 1.0)
    return (rows / scale).round_().to(torch.int8), scale


def _replaced(params: Params, kind: Callable[[Tensor], _Prepared], dtypes: set[torch.dtype]) -> Params:
    return tree_map(lambda leaf: kind(leaf.detach()) if _to_replace(leaf, dtypes) else leaf, params)


def _to_replace(leaf: Tensor, dtypes: set[torch.dtype]) -> bool:
    return leaf.ndim == 2 and leaf.numel() >= _SMALLEST and leaf.dtype in dtypes
