"""Bytes that the fused log-prob holds while one of its passes runs, and neither takes nor returns.

Positions under the mask are dropped before anything is allocated. How many those are is not known from
shapes, so all positions are counted: of a batch that is mostly prompts this is too much by N D numbers, and
where logits are kept by as many rows of these.
"""

from typing import Any

import torch
from torch import Tensor

from minirlhf.kernels import cpu, passes

_FORWARD, _BACKWARD = "minirlhf::log_prob", "minirlhf::log_prob_gradient"
# Pieces that torch's operators hold beside the one they work on, where no kernel of ours does it in one pass.
_PLAIN_FORWARD, _PLAIN_BACKWARD = 2, 4


def workspace(operator: Any, arguments: tuple[Any, ...]) -> int:
    """Of one call of an operator (an `OpOverload`) with these arguments; 0 for any but our two.

    >>> import minirlhf.kernels.fused
    >>> states, matrix = torch.empty(8, 4, device="meta"), torch.empty(10, 4, device="meta")
    >>> ids, mask = torch.empty(8, dtype=torch.int64), torch.empty(8, dtype=torch.bool)
    >>> forward = torch.ops.minirlhf.log_prob.default
    >>> workspace(forward, (states, matrix, ids, mask, 1.0, True, 0)) >= 8 * 10 * 4
    True
    >>> workspace(torch.ops.aten.mm.default, (states, matrix.T))
    0
    """
    name = operator.name() if isinstance(operator, torch._ops.OpOverload) else ""
    if name == _FORWARD:
        states, matrix, *_, keep = arguments
        plain = 0 if _by_kernel(states, matrix) else _PLAIN_FORWARD
        if keep:  # the logits are returned, and gone over as a whole
            return _rows(states, matrix) + plain * _whole(states, matrix) + _widened(matrix, len(matrix))
        width = _width(states, matrix, passes.PIECE)
        return _rows(states, matrix) + (1 + plain) * _piece(states, matrix, width) + _widened(matrix, width)
    if name == _BACKWARD:
        states, matrix, _, _, _, _, kept, *_, by_matrix = arguments
        width = _width(states, matrix, passes.COPIED if len(kept) else passes.PIECE)
        plain = 0 if _by_kernel(states, matrix) else _PLAIN_BACKWARD
        pieces = (1 + plain) * _piece(states, matrix, width) + _widened(matrix, width)
        whole = _widened(matrix, len(matrix)) if by_matrix else 0
        # Afterwards: the states, their gradient before it is put in place, and one product of the two's size.
        return whole + max(_rows(states, matrix) + pieces, 3 * _rows(states, matrix))
    return 0


def _rows(states: Tensor, matrix: Tensor) -> int:
    return states.numel() * passes.wide_type(states, matrix).itemsize


def _whole(states: Tensor, matrix: Tensor) -> int:
    return len(states) * len(matrix) * passes.wide_type(states, matrix).itemsize


def _width(states: Tensor, matrix: Tensor, most: int) -> int:
    row = len(states) * passes.wide_type(states, matrix).itemsize
    return min(len(matrix), max(passes._NARROWEST, most // max(row, 1)))


def _piece(states: Tensor, matrix: Tensor, width: int) -> int:
    return len(states) * width * passes.wide_type(states, matrix).itemsize


def _widened(matrix: Tensor, tokens: int) -> int:
    """A copy of so many tokens' rows in the type that is computed in, where it is another."""
    wide = passes.wide_type(matrix, matrix)
    return 0 if wide == matrix.dtype else tokens * matrix.shape[1] * wide.itemsize


def _by_kernel(states: Tensor, matrix: Tensor) -> bool:
    wide = passes.wide_type(states, matrix)
    return states.device.type == "cpu" and wide == torch.float32 and cpu.available()
