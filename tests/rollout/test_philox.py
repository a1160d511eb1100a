"""The uniforms are the published generator's, and belong to a token, not to a batch."""

import pytest
import torch

from minirlhf.rollout.philox import philox4x32, uniforms

# Random123's kat_vectors for philox4x32 with 10 rounds: counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> torch.Tensor:
    return torch.tensor([int(word, 16) for word in text.split()])


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_philox_gives_the_published_known_answers(counter: str, key: str, result: str) -> None:
    assert philox4x32(words(counter), words(key)).tolist() == words(result).tolist()


def test_philox_treats_every_counter_of_a_batch_alone() -> None:
    counters = torch.stack([words(counter) for counter, _, _ in KNOWN_ANSWERS])
    key = words("a4093822 299f31d0")
    alone = torch.stack([philox4x32(counter, key) for counter in counters])
    assert torch.equal(philox4x32(counters, key), alone)
    assert torch.equal(philox4x32(counters.flip(0)[None], key)[0], alone.flip(0))


def philox_in_python_integers(counter: list[int], key: list[int]) -> list[int]:
    """The paper's rounds on unbounded integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        left, right = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (right >> 32) ^ c1 ^ k0, right % 2**32, (left >> 32) ^ c3 ^ k1, left % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


def test_a_uniform_is_the_top_24_bits_of_the_first_word_of_its_own_counter() -> None:
    seed, prompt, sample, t = 2**40 + 5, 2**35 + 7, 2**31 + 9, 11
    first = philox_in_python_integers([t, sample, prompt % 2**32, prompt >> 32], [5, 2**8])[0]
    drawn = uniforms(seed, torch.tensor([prompt]), torch.tensor([sample]), t)
    assert drawn.dtype == torch.float64
    assert drawn.tolist() == [(first >> 8) / 2**24]


def test_uniforms_depend_on_the_row_and_not_on_batch_mates_order_or_batch_size() -> None:
    prompt, sample = torch.arange(60) // 4, torch.arange(60) % 4
    t = torch.arange(7)[:, None]
    together = uniforms(1, prompt, sample, t)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    assert torch.equal(uniforms(1, prompt[order], sample[order], t), together[:, order])
    alone = [uniforms(1, prompt[i : i + 1], sample[i : i + 1], step) for step in range(7) for i in range(60)]
    assert torch.equal(torch.cat(alone).view(7, 60), together)


def test_seed_prompt_sample_and_position_each_change_every_uniform() -> None:
    index, zero = torch.arange(50), torch.zeros(50, dtype=torch.int64)
    base = uniforms(1, index, zero, 0)
    others = [
        uniforms(2, index, zero, 0),
        uniforms(1 + 2**32, index, zero, 0),
        uniforms(1, index + 2**32, zero, 0),
        uniforms(1, index, zero + 1, 0),
        uniforms(1, index, zero, 1),
        uniforms(1, zero, index + 1, 0),
    ]
    for other in others:
        assert (other != base).all()


def test_uniforms_are_uniform_and_never_reach_one_even_in_fp32() -> None:
    drawn = uniforms(0, torch.arange(1000)[:, None], torch.arange(100), 5).flatten()
    assert torch.equal(drawn.float().double(), drawn), "24 bits are exact in fp32"
    assert 0 <= float(drawn.min()) and float(drawn.float().max()) < 1
    counts = torch.histc(drawn, bins=64, min=0, max=1)
    expected = len(drawn) / 64
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 63 + 5 * (2 * 63) ** 0.5, "64 equal bins: mean 63, five standard deviations"
    correlation = torch.corrcoef(drawn.view(1000, 100).T)[0, 1:].abs().max()
    assert correlation < 5 / 1000**0.5, "samples of one prompt are unrelated"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, [0], [0], 0), r"seed must lie in \[0, 2\*\*64\), got -1"),
        ((2**64, [0], [0], 0), "seed must lie in"),
        ((0, [-3], [0], 0), r"prompt_index must lie in \[0, 9223372036854775808\), got -3 .. -3"),
        ((0, [0, 1], [0, 2**32], 0), r"sample_index must lie in \[0, 4294967296\), got 0 .. 4294967296"),
        ((0, [0], [0], -1), "t must lie in"),
        ((0, [0.5], [0], 0), "prompt_index must be int64, got torch.float32"),
    ],
)
def test_indices_out_of_range_are_refused_by_name(arguments: tuple, message: str) -> None:
    seed, prompt, sample, t = arguments
    with pytest.raises(ValueError, match=message):
        uniforms(seed, torch.tensor(prompt), torch.tensor(sample), t)


def test_counters_and_keys_of_another_shape_or_type_are_refused() -> None:
    four, two = torch.zeros(4, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(
        ValueError, match=r"counter must be int64 with last dimension 4, got torch.int64 \[2\]"
    ):
        philox4x32(two, two)
    with pytest.raises(ValueError, match="key must be int64"):
        philox4x32(four, two.int())
