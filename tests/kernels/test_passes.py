"""The two passes below autograd: what is kept, how large a piece is, who computes it, and what is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from minirlhf.kernels import cpu, library, passes
from minirlhf.kernels.fused import log_prob
from minirlhf.kernels.passes import log_prob_plain


def unreal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def pieces(rows: int, vocabulary: int, dtype: torch.dtype = torch.float32) -> list[tuple[int, int]]:
    """(first token, number of tokens) of each piece of [rows, vocabulary] logits."""
    given = (
        unreal(rows, 1, dtype=dtype),
        unreal(vocabulary, 1, dtype=dtype),
        unreal(0, vocabulary, dtype=dtype),
    )
    return [(first, logits.shape[1]) for first, logits in passes._pieces(*given)]


@pytest.mark.parametrize(
    ("states", "unembedding", "bytes_each"),
    [
        (torch.float32, torch.float32, 4),
        (torch.bfloat16, torch.bfloat16, 4),
        (torch.float64, torch.float32, 8),
        (torch.bfloat16, torch.float64, 8),
    ],
)
def test_logits_of_up_to_256_mib_are_kept_in_the_type_they_are_computed_in(
    states: torch.dtype, unembedding: torch.dtype, bytes_each: int
) -> None:
    vocabulary = 2**10
    most = 256 * 2**20 // (bytes_each * vocabulary)
    matrix = unreal(vocabulary, 1, dtype=unembedding)
    dtype = passes.wide_type(unreal(1, 1, dtype=states), matrix)
    assert passes.fits(most, matrix, dtype)
    assert not passes.fits(most + 1, matrix, dtype)


def test_a_piece_has_32_mib_of_logits() -> None:
    assert pieces(2**10, 20_000) == [(0, 8192), (8192, 8192), (16384, 20_000 - 16384)]
    assert pieces(2**10, 5000, torch.float64) == [(0, 4096), (4096, 5000 - 4096)]
    assert pieces(1, 2**23 + 5) == [(0, 2**23), (2**23, 5)]


def test_a_copy_of_kept_logits_has_8_mib() -> None:
    given = unreal(2**10, 1), unreal(5000, 1), unreal(2**10, 5000)
    copies = [(first, logits.shape[1]) for first, logits in passes._pieces(*given, again=True)]
    assert copies == [(0, 2048), (2048, 2048), (4096, 5000 - 4096)]


def test_a_piece_has_256_tokens_however_many_rows_there_are() -> None:
    assert pieces(2**20, 600) == [(0, 256), (256, 256), (512, 88)]
    assert pieces(2**20, 100) == [(0, 100)]
    assert pieces(0, 100) == [(0, 100)]


def test_where_the_logits_fit_the_second_pass_reads_them_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "COPIED", 0)
    g = torch.Generator().manual_seed(0)
    states, unembedding = torch.randn(5, 3, generator=g).double(), torch.randn(600, 3, generator=g).double()
    ids, mask = torch.randint(600, (5,), generator=g), torch.tensor([True, False, True, True, True])

    def gradients(function: Callable[..., Any], **given: Any) -> tuple[Tensor, ...]:
        def weighted(states: Tensor, unembedding: Tensor) -> Tensor:
            logp, entropy = function(states, unembedding, ids, mask, 0.7, **given)[:2]
            return (logp * torch.arange(5) - entropy).sum()

        return torch.func.grad(weighted, argnums=(0, 1))(states, unembedding)

    for a, b in zip(gradients(log_prob, entropy=True), gradients(log_prob_plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_that_is_not_wanted_is_empty_and_one_that_is_has_the_type_of_its_input(
    dtype: torch.dtype,
) -> None:
    states, unembedding = torch.ones(2, 3, dtype=dtype), torch.ones(4, 3, dtype=dtype)
    ids, mask = torch.tensor([0, 3]), torch.tensor([True, True])
    for by_states in (True, False):
        for by_matrix in (True, False):
            _, entropy, lse, _, kept = passes.forward_pass(states, unembedding, ids, mask, 1.0, True, 0)
            found = states, unembedding, ids, mask, entropy, lse, kept, torch.ones(2), torch.ones(2), 1.0
            got = passes.backward_pass(*found, by_states, by_matrix)
            assert [each.shape for each in got] == [
                states.shape if by_states else (0,),
                unembedding.shape if by_matrix else (0,),
            ]
            assert all(each.dtype == dtype for each in got)


def test_an_entropy_that_is_not_asked_for_is_zero() -> None:
    states, unembedding = torch.ones(2, 3), torch.eye(4, 3)
    ids, mask = torch.tensor([0, 3]), torch.tensor([True, False])
    _, entropy, _ = log_prob(states, unembedding, ids, mask, 1.0, entropy=False)
    assert entropy.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(("ids", "wrong"), [([0, 4], 4), ([1, 4], 4), ([0, -1], -1), ([-2, 7], -2)])
def test_the_id_that_is_named_is_one_that_is_outside(ids: list[int], wrong: int) -> None:
    states, unembedding, mask = torch.ones(2, 3), torch.ones(4, 3), torch.tensor([True, True])
    with pytest.raises(IndexError, match=f"token id {wrong} under the mask is outside the vocabulary of 4"):
        log_prob(states, unembedding, torch.tensor(ids), mask, 1.0, entropy=False)


@pytest.mark.parametrize("function", [log_prob_plain, lambda *given: log_prob(*given, entropy=True)])
def test_a_vocabulary_of_one_token_has_one_law(function: Callable[..., tuple[Tensor, ...]]) -> None:
    states, ids, mask = torch.ones(3, 2), torch.tensor([0, -100, 0]), torch.tensor([True, False, True])
    logp, entropy, best = function(states, torch.ones(1, 2), ids, mask, 1.0)
    assert not logp.any() and not entropy.any() and torch.equal(best, mask)


def test_our_kernels_are_for_fp32_on_the_cpu_where_they_could_be_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert cpu.available(), "no C++ compiler here"
    assert passes._by_kernel(torch.empty(1))
    assert not passes._by_kernel(torch.empty(1, dtype=torch.float64)) and not passes._by_kernel(unreal(1))
    monkeypatch.setattr(library, "_library", lambda: None)
    assert not passes._by_kernel(torch.empty(1))


def test_where_they_are_they_do_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    for name in ("absorb", "to_gradient"):
        own = getattr(cpu, name)
        monkeypatch.setattr(cpu, name, lambda *given, n=name, f=own: called.append(n) or f(*given))
    states, unembedding = torch.ones(2, 3, requires_grad=True), torch.eye(4, 3)
    ids, mask = torch.tensor([0, 3]), torch.tensor([True, True])
    log_prob(states, unembedding, ids, mask, 1.0, entropy=True)[0].sum().backward()
    assert called == ["absorb", "to_gradient"]


def test_from_four_million_logits_on_a_compiled_body_does_and_it_serves_pieces_of_every_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[dict[str, Any]] = []

    def compile(work: Callable[..., Any], **how: Any) -> Callable[..., Any]:
        told.append(how)
        return lambda: work

    def work() -> None: ...

    monkeypatch.setattr(torch, "compile", compile)
    assert passes._body(work, unreal(2**22 - 1)) is work and not told
    first, second = (passes._body(work, unreal(2**22, more)) for more in (1, 3))
    assert first is second is not work and told == [{"dynamic": True}]
