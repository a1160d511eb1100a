"""The assertion that most of these tests end in: equal in fp64, up to the order of a few additions."""

from typing import Any

import torch


def close(got: Any, expected: Any) -> None:
    """Tensors, or NamedTuples of tensors, agree to 1e-10, relative and absolute; their dtypes agree too."""
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
