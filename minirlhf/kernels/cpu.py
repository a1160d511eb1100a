"""The kernels in `native/` as functions of tensors; see `kernels.library`."""

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack

from minirlhf.kernels.library import available, built

# Sizes from which `matmul` is faster than torch's product, two cores (Xeon with AMX).
_FEWEST, _SMALLEST = 64, 2**25

_Ints = NDArray[np.int64]
_long, _pointer = ctypes.c_long, ctypes.c_void_p


def bare(x: Tensor) -> bool:
    """Whether this is numbers in memory that nobody differentiates, maps or traces: no rules are needed."""
    plain = type(x) is Tensor and not torch.is_grad_enabled()
    return plain and peek_interpreter_stack() is None


class Layout(NamedTuple):
    """How a packed matrix lies in memory, and what multiplies by it.

    depth: inputs -> those that are stored, the rest being zeros. pack, product: see native/.
    """

    depth: Callable[[int], int]
    pack: Callable[..., None]
    product: Callable[..., None]


def layouts() -> dict[str, Layout]:
    """Those that this processor has, the best one last: "vectors", and "tiles" (AMX)."""
    library = built()
    found = {"vectors": Layout(lambda depth: depth, library.pack, library.product)}
    if library.has_tiles():
        found["tiles"] = Layout(library.tiles_depth, library.pack_tiles, library.product_tiles)
    return found


@functools.cache
def best_layout() -> Layout:
    """The last of `layouts`."""
    return list(layouts().values())[-1]


def packed_size(depth: int, width: int, layout: Layout | None = None) -> int:
    """Entries that a packed matrix [depth, width] takes."""
    panel = built().panel()
    return -(-width // panel) * (layout or best_layout()).depth(depth) * panel


class PackedMatrix(NamedTuple):
    """A matrix [depth, width] as `product` reads it: its entries, of `packed_size`, in a layout."""

    entries: Tensor
    depth: int
    width: int
    layout: Layout


def packed(matrix: Tensor, out: Tensor | None = None, layout: Layout | None = None) -> PackedMatrix:
    """A matrix [in, out], fp32, in panels of outputs.

    Args:
        out: where to write, `packed_size` entries; None for new memory.
        layout: None for the best.

    Raises:
        ValueError: not a matrix of fp32 on the CPU with one stride of 1, or an `out` of another size.
    """
    layout, cpu = layout or best_layout(), matrix.device.type == "cpu"
    if matrix.ndim != 2 or matrix.dtype != torch.float32 or 1 not in matrix.stride() or not cpu:
        raise ValueError(
            f"expected a matrix [in, out] of fp32 on the CPU, one of its strides 1; got {matrix.dtype} "
            f"{list(matrix.shape)} with strides {matrix.stride()} on {matrix.device}"
        )
    depth, width = matrix.shape
    size = packed_size(depth, width, layout)
    out = torch.empty(size) if out is None else out
    if out.numel() != size or not out.is_contiguous():
        raise ValueError(f"out must have {size} entries in one piece, got {list(out.shape)}")
    layout.pack(matrix.data_ptr(), depth, width, *matrix.stride(), out.data_ptr())
    return PackedMatrix(out, depth, width, layout)


def product(x: Tensor, matrix: PackedMatrix, bias: Tensor | None) -> Tensor:
    """x [N, in] times a matrix [in, out], plus bias [out]: [N, out], fp32.

    Raises:
        ValueError: shapes that do not fit.
    """
    entries, depth, width, layout = matrix
    if x.shape[-1] != depth or (bias is not None and bias.shape != (width,)):
        raise ValueError(f"cannot multiply {list(x.shape)} by a matrix of {depth} x {width}")
    x, bias = x.contiguous(), bias if bias is None else bias.contiguous()
    out = torch.empty(len(x), width)
    start = None if bias is None else bias.data_ptr()
    layout.product(x.data_ptr(), len(x), depth, entries.data_ptr(), width, start, out.data_ptr())
    return out


def multiplies(x: Tensor, w: Tensor) -> bool:
    """Whether `matmul` is for x [..., in] and w [in, out]: fp32 on the CPU, and sizes where it pays."""
    if {x.dtype, w.dtype} != {torch.float32} or {x.device.type, w.device.type} != {"cpu"}:
        return False
    depth, columns = w.shape
    rows = x.numel() // max(depth, 1)
    large = rows >= _FEWEST and depth >= _FEWEST and columns >= _FEWEST
    return large and rows * depth * columns >= _SMALLEST and has_tiles()


def matmul(
    x: Tensor, w: Tensor, *, bias: Tensor | None = None, out: Tensor | None = None, more: bool = False
) -> Tensor:
    """x [N, in] times w [in, out], plus bias [out]: [N, out], by tiles, to the precision of fp32.

    An infinite number gives NaN. Summed in pieces of 768 inputs: rounds a third less than torch's product.

    Args:
        out: where to write, rows of any distance; None for new memory.
        more: adds to what is in `out` instead of bias.

    Raises:
        ValueError: shapes that do not fit, or an `out` whose rows are not in one piece.
    """
    (rows, depth), (deep, columns) = x.shape, w.shape
    out = torch.empty(rows, columns) if out is None else out
    right = (
        deep == depth and out.shape == (rows, columns) and out.stride(1) == 1 and out.dtype == torch.float32
    )
    if not right or (bias is not None and bias.shape != (columns,)):
        raise ValueError(
            f"cannot multiply {list(x.shape)} by {list(w.shape)} into {list(out.shape)} with strides "
            f"{out.stride()}"
        )
    x, w = (each if 1 in each.stride() else each.contiguous() for each in (x, w))
    bias = bias if bias is None else bias.contiguous()
    built().matmul_tiles(
        x.data_ptr(), *x.stride(), w.data_ptr(), w.stride(1), w.stride(0), rows, depth, columns,
        None if bias is None else bias.data_ptr(), more, out.data_ptr(), out.stride(0),
    )  # fmt: skip
    return out


def has_tiles() -> bool:
    """Whether the kernels can be used, and the processor has tiles (AMX) for them."""
    return available() and bool(built().has_tiles())


def draw(law_logp: Tensor, uniform: Tensor, boundary: float) -> tuple[Tensor, Tensor]:
    """What `rollout.draw.inverse_cdf` says, for fp32 [B, V] and fp64 [B] on the CPU."""
    law_logp, uniform = law_logp.contiguous(), uniform.contiguous()
    token = torch.empty(len(law_logp), dtype=torch.int64)
    near = torch.empty(len(law_logp), dtype=torch.bool)
    pointers = uniform.data_ptr(), boundary, token.data_ptr(), near.data_ptr()
    built().draw(law_logp.data_ptr(), *law_logp.shape, *pointers)
    return token, near


def draw_tempered(
    logits: Tensor, temperature: float, uniform: Tensor, boundary: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From softmax(z / temperature), for fp32 logits [B, V] and uniforms fp64 [B] on the CPU.

    Returns:
        (token, near another's interval, the token's log-prob at temperature 1, and under the law), [B] each.
    """
    logits, uniform, size = logits.contiguous(), uniform.contiguous(), len(logits)
    token, near = torch.empty(size, dtype=torch.int64), torch.empty(size, dtype=torch.bool)
    logp, law_logp = torch.empty(size), torch.empty(size)
    pointers = (each.data_ptr() for each in (token, near, logp, law_logp))
    given = temperature, uniform.data_ptr(), boundary
    built().draw_tempered(logits.data_ptr(), *logits.shape, *given, *pointers)
    return token, near, logp, law_logp


def logsumexp(logits: Tensor) -> Tensor:
    """log Σ_v e^(z_v) of each row of fp32 [B, V] on the CPU; no -inf throughout a row, no +inf, no NaN."""
    logits = logits.contiguous()
    out = torch.empty(len(logits))
    built().logsumexp(logits.data_ptr(), *logits.shape, out.data_ptr())
    return out


def absorb(logits: Tensor, most: Tensor, total: Tensor, weighted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The sums of an online softmax [N] over one more piece of logits [N, w]; see native/logprob.cpp."""
    sums = most.clone(), total.clone(), weighted.clone()
    built().absorb(logits.data_ptr(), *logits.shape, *(each.data_ptr() for each in sums))
    return sums


def to_gradient(
    logits: Tensor, lse: Tensor, by_logp: Tensor, by_entropy: Tensor, entropies: Tensor
) -> Tensor:
    """Overwrites logits [N, w] by a gradient; see native/logprob.cpp."""
    given = [each.contiguous() for each in (lse, by_logp, by_entropy, entropies)]
    built().to_gradient(logits.data_ptr(), *logits.shape, *(each.data_ptr() for each in given))
    return logits


def gelu(x: Tensor) -> Tensor:
    """gelu in its tanh form of fp32 on the CPU."""
    x, out = x.contiguous(), torch.empty(x.shape)
    built().gelu(x.data_ptr(), x.numel(), out.data_ptr())
    return out


def gelu_gradient(by_y: Tensor, x: Tensor) -> Tensor:
    """by_y times gelu's derivative at x."""
    by_y, x, out = by_y.contiguous(), x.contiguous(), torch.empty(x.shape)
    built().gelu_gradient(by_y.data_ptr(), x.data_ptr(), x.numel(), out.data_ptr())
    return out


class Reads:
    """Which pages the rows of a decode step read; see `Reads` in native/attention.cpp.

    Args:
        heads, page: of the cache; the rest int64: first [B + 1]; arena, at, start [E]; position, into [B].
        own: the arena that new tokens go into.
    """

    def __init__(
        self, heads: int, page: int, own: int, *,
        first: _Ints, arena: _Ints, at: _Ints, start: _Ints, position: _Ints, into: _Ints,
    ) -> None:  # fmt: skip
        self.heads, self.page, self.own = heads, page, own
        arrays = first, arena, at, start, position, into
        self._form: tuple[tuple[int, ...], ...] | None = None
        self._arrays = [np.ascontiguousarray(each, np.int64) for each in arrays]

    def attend(
        self, keys: Sequence[Tensor], values: Sequence[Tensor], q: Tensor, k: Tensor, v: Tensor,
        *, scale: float | None, window: int | None,
    ) -> Tensor:  # fmt: skip
        """Writes k and v [B, H, 1, Dh] and attends to what each row sees: like q, [B, Hq, 1, Dh].

        keys, values: of each arena [pages, H, page, Dh], contiguous.
        """
        q, k, v = (each if each.stride(-1) == 1 else each.contiguous() for each in (q, k, v))
        form = q.shape, q.stride(), k.stride(), v.stride()
        if form != self._form:  # once a step: layers are alike
            self._form, (rows, asked, _, size) = form, q.shape
            sizes = rows, self.heads, asked // self.heads, size, self.page, self.own
            self._layout = _Reads(*sizes, *(each.ctypes.data for each in self._arrays))
            self._strides = (_long * 6)(*(stride for each in form[1:] for stride in each[:2]))
        table = _pointer * len(keys)
        out = torch.empty(form[0])
        built().attend(
            ctypes.byref(self._layout), table(*(each.data_ptr() for each in keys)),
            table(*(each.data_ptr() for each in values)), q.data_ptr(), k.data_ptr(), v.data_ptr(),
            self._strides, q.shape[-1] ** -0.5 if scale is None else scale, window or 0, out.data_ptr(),
        )  # fmt: skip
        return out


class _Reads(ctypes.Structure):
    _fields_ = [(name, _long) for name in ("rows", "heads", "group", "size", "page", "own")] + [
        (name, _pointer) for name in ("first", "arena", "at", "start", "position", "into")
    ]
