"""The compiled kernels against the operations of torch that they replace, in fp64."""

import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor

from minirlhf.kernels import cpu, library, memory
from minirlhf.objectives.sampling import tempered
from minirlhf.rollout.draw import BOUNDARY, inverse_cdf

pytestmark = pytest.mark.skipif(not cpu.available(), reason="no C++ compiler")


LAYOUTS = cpu.layouts() if cpu.available() else {}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 16, 17, 31, 40, 257])
@pytest.mark.parametrize(
    ("depth", "width"), [(1, 1), (5, 47), (16, 48), (33, 49), (100, 96), (1030, 50), (2049, 130)]
)
def test_a_packed_product_is_the_product(rows: int, depth: int, width: int, layout: str) -> None:
    lay = LAYOUTS[layout]
    x, matrix, bias = normal(rows, depth), normal(depth, width, seed=1), normal(width, seed=2)
    exact = x.double() @ matrix.double()
    close = {"rtol": 0, "atol": 1e-6 + 2e-7 * depth}  # rounding of sums that are taken one after the other
    for stored in (matrix, matrix.T.contiguous().T):
        got = cpu.product(x, cpu.packed(stored, layout=lay), None)
        torch.testing.assert_close(got.double(), exact, **close)
    got = cpu.product(x, cpu.packed(matrix, layout=lay), bias)
    torch.testing.assert_close(got.double(), exact + bias.double(), **close)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_row_of_a_product_does_not_depend_on_the_others_beside_it(layout: str) -> None:
    x, matrix = normal(8, 700), cpu.packed(normal(700, 100, seed=1), layout=LAYOUTS[layout])
    together = cpu.product(x, matrix, None)
    x[1:] = torch.nan
    assert torch.equal(cpu.product(x, matrix, None)[0], together[0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_packed_product_rounds_no_more_than_torch_does(layout: str) -> None:
    """The error of sums in fp32 grows with the root of their length; a part that is left out would show."""
    matrix = normal(2048, 96, seed=1)
    x = normal(64, 2048) * torch.logspace(-20, 20, 64)[:, None]  # 8 bits are as good at every size
    exact = x.double() @ matrix.double()
    scale = x.double().norm(dim=1, keepdim=True) * matrix.double().norm(dim=0)
    got = cpu.product(x, cpu.packed(matrix, layout=LAYOUTS[layout]), None)
    error, plain = (((each.double() - exact) / scale).square().mean().sqrt() for each in (got, x @ matrix))
    assert error < 4 * plain
    assert error < 2e-8


@pytest.mark.parametrize("rows", [16, 33, 70])
def test_products_may_run_in_several_threads_at_once(rows: int) -> None:
    """Each has memory of its own: rollouts may run beside one another."""
    matrix, inputs = cpu.packed(normal(300, 200, seed=1)), [normal(rows, 300, seed=i) for i in range(200)]
    alone = [cpu.product(x, matrix, None) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda x: cpu.product(x, matrix, None), inputs))
    assert all(torch.equal(*each) for each in zip(together, alone, strict=True))


def test_what_does_not_fit_is_refused() -> None:
    matrix = cpu.packed(normal(6, 5))
    with pytest.raises(ValueError, match=r"cannot multiply \[2, 7\] by a matrix of 6 x 5"):
        cpu.product(normal(2, 7), matrix, None)
    with pytest.raises(ValueError, match="cannot multiply"):
        cpu.product(normal(2, 6), matrix, normal(4))
    with pytest.raises(ValueError, match="one of its strides 1"):
        cpu.packed(normal(12, 10)[::2, ::2])
    with pytest.raises(ValueError, match=r"torch\.float64"):
        cpu.packed(normal(3, 3).double())
    with pytest.raises(ValueError, match="out must have"):
        cpu.packed(normal(3, 3), torch.empty(5))


def attention(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """[Hq, Dh] from q [Hq, Dh] and what it sees, [H, T, Dh], in fp64."""
    group = len(q) // len(keys)
    keys, values = (each.double().repeat_interleave(group, 0) for each in (keys, values))
    weights = ((keys @ q.double()[..., None])[..., 0] * scale).softmax(-1)
    return (weights[:, None] @ values)[:, 0]


@pytest.mark.parametrize("size", [4, 20, 64, 128])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("window", [None, 1, 5, 40])
@pytest.mark.parametrize("scores", [1.0, 60.0])
def test_attention_over_pages_is_attention(size: int, group: int, window: int | None, scores: float) -> None:
    page, heads, positions = 32, 2, [0, 5, 31, 32, 70, 95]
    rows = len(positions)
    shared, own = normal(2, heads, page, size), normal(12, heads, page, size, seed=1)
    shared_values, own_values = normal(2, heads, page, size, seed=2), normal(12, heads, page, size, seed=3)
    pages = torch.randperm(12, generator=torch.Generator().manual_seed(0)).tolist()
    first, arena, at, start, into = [0], [], [], [], []
    for position in positions:  # rows of more than a page read shared page 1 first
        for number in range(position // page + 1):
            is_shared = number == 0 and position >= page
            arena.append(0 if is_shared else 1)
            at.append(1 if is_shared else pages.pop())
            start.append(number * page)
        into.append(at[-1])
        first.append(len(at))
    q = normal(rows, heads * group, 1, size, seed=4) * scores
    fused = normal(rows, 3, heads, size, seed=5)  # keys and values are views of one product
    k, v = (fused[:, part].reshape(rows, 1, heads, size).transpose(1, 2) for part in (1, 2))
    reads = cpu.Reads(
        heads, page, 1, first=np.array(first), arena=np.array(arena), at=np.array(at), start=np.array(start),
        position=np.array(positions), into=np.array(into),
    )  # fmt: skip
    got = reads.attend([shared, own], [shared_values, own_values], q, k, v, scale=None, window=window)
    for row, position in enumerate(positions):
        entries = range(first[row], first[row + 1])
        seen = slice(max(0, position + 1 - window) if window else 0, position + 1)
        held = [
            torch.cat([leaves[arena[each]][at[each]] for each in entries], dim=1)[:, seen]
            for leaves in ((shared, own), (shared_values, own_values))
        ]
        assert torch.equal(held[0][:, -1], k[row, :, 0]) and torch.equal(held[1][:, -1], v[row, :, 0])
        expected = attention(q[row, :, 0], *held, scale=size**-0.5)
        torch.testing.assert_close(got[row, :, 0].double(), expected, rtol=0, atol=3e-6 * scores)
    half = reads.attend(
        [shared, own], [shared_values, own_values], q, k, v, scale=0.5 * size**-0.5, window=window
    )
    doubled = reads.attend(
        [shared, own], [shared_values, own_values], q * 0.5, k, v, scale=None, window=window
    )
    torch.testing.assert_close(half, doubled, rtol=0, atol=1e-5)


@pytest.mark.parametrize("width", [1, 5, 256, 257, 300, 50257])
def test_a_draw_is_the_one_that_torch_makes(width: int) -> None:
    logits = normal(64, width) * 4
    logits[:, 1::3] = -torch.inf
    law = logits.log_softmax(-1)
    uniform = torch.rand(64, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    uniform[:3] = torch.tensor([0.0, 1 - 1e-16, 0.5])
    token, near = cpu.draw(law, uniform, BOUNDARY)
    expected = inverse_cdf(law, uniform)
    assert ((token == expected.token) | near).all() and (near == expected.near_boundary).float().mean() > 0.98
    assert (law.gather(1, token[:, None]) > -torch.inf).all()


@pytest.mark.parametrize("width", [1, 5, 256, 257, 300, 50257])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7, 1e-30])
def test_a_draw_from_logits_is_the_one_from_the_law_that_they_make(width: int, temperature: float) -> None:
    logits = normal(64, width) * 4 - 900  # far from 0: the largest has to be subtracted first
    logits[:, 1::3] = -torch.inf
    law = tempered(logits, temperature=temperature)
    uniform = torch.rand(64, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    uniform[:3] = torch.tensor([0.0, 1 - 1e-16, 0.5])
    token, near, logp, law_logp = cpu.draw_tempered(logits, temperature, uniform, BOUNDARY)
    expected = inverse_cdf(law, uniform)
    assert ((token == expected.token) | near).all() and (near == expected.near_boundary).float().mean() > 0.98
    exact = [(logits.double() / t).log_softmax(-1).gather(1, token[:, None])[:, 0] for t in (1, temperature)]
    torch.testing.assert_close(logp.double(), exact[0], rtol=2e-7, atol=1e-6)
    torch.testing.assert_close(law_logp.double(), exact[1], rtol=2e-7, atol=1e-6)


def test_a_draw_from_logits_with_nan_is_a_token_whose_log_probs_say_so() -> None:
    for bad in (torch.nan, torch.inf):
        logits = normal(3, 600)
        logits[1, 400] = bad
        token, _, *log_probs = cpu.draw_tempered(logits, 0.5, torch.full((3,), 0.5).double(), BOUNDARY)
        assert ((token >= 0) & (token < 600)).all()
        for each in log_probs:
            assert each.isnan().tolist() == [False, True, False]


def test_draws_follow_the_law() -> None:
    law = torch.tensor([0.0, 0.125, 0.5, 0.0, 0.375, 0.0]).log().expand(100_000, 6)
    uniform = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    token, near = cpu.draw(law, uniform, BOUNDARY)
    assert torch.bincount(token, minlength=6).tolist() == [0, 12_500, 50_000, 0, 37_500, 0]
    assert near.nonzero()[:, 0].tolist() == [12_499, 12_500, 62_499, 62_500]


@pytest.mark.parametrize("width", [1, 2, 15, 16, 17, 1000])
def test_the_normaliser_is_the_log_sum_exp(width: int) -> None:
    for scale in (1.0, 1e4):
        logits = normal(5, width) * scale
        logits[:, : width // 2] = -torch.inf
        got, exact = cpu.logsumexp(logits), logits.double().logsumexp(-1)
        torch.testing.assert_close(got.double(), exact, rtol=2e-7, atol=2e-6)


def test_a_room_is_left_to_the_next_of_its_kind_and_never_handed_out_twice() -> None:
    memory.release_rooms()
    first, other = memory.Room("a", 1000), memory.Room("a", 1000)
    one, two = first.take((100,)), other.take((100,))
    assert one.data_ptr() != two.data_ptr() and one.data_ptr() % 64 == 0
    address = one.data_ptr()
    assert first.take((10,)).data_ptr() == address + 448, "behind it, on the next 64 bytes"
    assert not address <= first.take((1000,)).data_ptr() < address + 1000, "the room is full"
    del one, first
    assert memory.Room("b", 500).take((1,)).data_ptr() != address
    assert memory.Room("a", 900).take((1,)).data_ptr() == address
    larger = memory.Room("a", 100_000)
    assert larger.take((25_000,)).fill_(1).sum() == 25_000
    del larger
    memory.release_rooms()
    assert not memory._idle


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"CXX": "no-such-compiler"}, "there is no C++ compiler 'no-such-compiler'"),
        ({"CXX": f"{sys.executable} -c 'import sys; sys.exit(\"out of order\")'"}, "out of order"),
        ({"MINIRLHF_KERNELS": "0"}, None),
    ],
)
def test_without_a_compiler_it_says_so_once_and_samples_all_the_same(
    settings: dict[str, str], said: str | None
) -> None:
    program = (
        "import torch; from minirlhf.kernels import cpu; from minirlhf.rollout.drawing import drawn\n"
        "for _ in range(3): assert drawn(torch.zeros(1, 1), lambda z: z, torch.zeros(1)).token == 0\n"
        "print(cpu.available())"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=os.environ | settings
    )
    assert ran.stdout == "False\n"
    if said is None:
        assert not ran.stderr
    else:
        assert ran.stderr.count("Install a C++ compiler") == 1 and said in ran.stderr


def test_with_a_compiler_nothing_is_said() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        library._library.cache_clear()
        assert cpu.available()
