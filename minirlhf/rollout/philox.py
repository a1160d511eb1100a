"""Counter-based randomness: Philox4x32-10, a pure function of (seed, prompt, sample, position).

Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (SC11). There is no generator state to
share or to advance: the uniform of a token is a hash of who it is, so batch size, order, batch mates and
device cannot change it. The 32-bit words live in int64 tensors, whose wrapping products keep all 64 bits.
"""

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)  # golden ratio, √3 - 1: what the key grows by each round
_ROUNDS = 10


def philox4x32(counter: Tensor, key: Tensor) -> Tensor:
    """Ten rounds of the Philox bijection on 128-bit counters under a 64-bit key.

    Args:
        counter: int64 [..., 4], words in [0, 2³²).
        key: int64 [2], words in [0, 2³²).

    Returns:
        int64 [..., 4], words in [0, 2³²), each uniform over its 32 bits.

    Raises:
        ValueError: a wrong dtype or last dimension.

    >>> words = philox4x32(torch.zeros(4, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
    >>> [f"{word:08x}" for word in words.tolist()]
    ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    for name, words, width in (("counter", counter, 4), ("key", key, 2)):
        if words.dtype != torch.int64 or words.shape[-1:] != (width,):
            raise ValueError(
                f"{name} must be int64 with last dimension {width}, got {words.dtype} {list(words.shape)}"
            )
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key.unbind(-1)
    for _ in range(_ROUNDS):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # modulo 2⁶⁴
        c0, c1, c2, c3 = (
            _high(product1) ^ c1 ^ k0,
            product1 & _WORD,
            _high(product0) ^ c3 ^ k1,
            product0 & _WORD,
        )
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return torch.stack([c0, c1, c2, c3], dim=-1)


def uniforms(seed: int, prompt_index: Tensor, sample_index: Tensor, t: Tensor | int) -> Tensor:
    """The uniform with which token t of sample `sample_index` of prompt `prompt_index` is drawn.

    24 bits: every value k / 2²⁴ is exact in fp32 too and none rounds to 1 (32 bits would).

    Args:
        seed: in [0, 2⁶⁴).
        prompt_index: int64, any shape, in [0, 2⁶³).
        sample_index: int64 in [0, 2³²); broadcasts with prompt_index.
        t: response position in [0, 2³²), 0 for the first sampled token; broadcasts likewise.

    Returns:
        fp64 in [0, 1) of the broadcast shape.

    Raises:
        ValueError: an index or seed out of range, or an index that is not int64.

    >>> index = torch.tensor([7, 8])
    >>> bool((uniforms(0, index, index, 3).flip(0) == uniforms(0, index.flip(0), index.flip(0), 3)).all())
    True
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must lie in [0, 2**64), got {seed}")
    position = torch.as_tensor(t, dtype=torch.int64, device=prompt_index.device)
    limits = (
        ("prompt_index", prompt_index, 2**63),
        ("sample_index", sample_index, 2**32),
        ("t", position, 2**32),
    )
    for name, index, limit in limits:
        if index.dtype != torch.int64:
            raise ValueError(f"{name} must be int64, got {index.dtype}")
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < limit:
            raise ValueError(f"{name} must lie in [0, {limit}), got {int(index.min())} .. {int(index.max())}")
    words = (position, sample_index, prompt_index & _WORD, prompt_index >> 32)
    counter = torch.stack(torch.broadcast_tensors(*words), dim=-1)
    key = torch.tensor([seed & _WORD, seed >> 32], device=counter.device)
    return (philox4x32(counter, key)[..., 0] >> 8).double() * 2.0**-24


def _high(product: Tensor) -> Tensor:
    return (product >> 32) & _WORD  # the shift is arithmetic: the mask removes the copied sign bits
