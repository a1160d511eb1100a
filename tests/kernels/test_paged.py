"""The GPU's attention over pages, without a GPU: interpreted on the host, and compiled for two of them.

`make triton` installs Triton and runs this page twice; which of them it does, Triton decides when imported.
"""

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from minirlhf.kernels import paged
from minirlhf.kernels.logprob import token_logp
from minirlhf.models.interface import aligned
from minirlhf.objectives.sampling import sampling_law
from minirlhf.rollout import recorded
from minirlhf.rollout.sampler import generate, response_mask
from minirlhf.rollout.weights import as_they_are
from tests.models.cases import CASES, Case, tiny_model
from tests.rollout import plain_paged

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton (make triton)")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET is not 1")
compiled = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET is 1")

PAGE = 8


class Step:
    """Rows whose newest tokens are at the given positions (-1: no row), and the pages that they read."""

    def __init__(
        self, *, positions: list[int], arenas: int, heads: int, group: int, size: int, dtype: torch.dtype
    ) -> None:
        g = torch.Generator().manual_seed(0)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

        # A page of the first arenas is read by all rows; then each row has pages of its own.
        entries, first, into, used = [], [0], [], 0
        before = (arenas - 1) * PAGE
        for position in positions:
            into.append(0)
            if position >= 0:
                own = (position - before) // PAGE + 1
                entries += [[arena, 1, arena * PAGE] for arena in range(arenas - 1)]
                entries += [[arenas - 1, used + page, before + page * PAGE] for page in range(own)]
                used += own
                into[-1] = used - 1
            first.append(len(entries))
        self.reads = paged.Reads(*(torch.tensor(each) for each in (first, entries, positions, into)))
        self.keys = [drawn(max(used, 2), heads, PAGE, size) for _ in range(arenas)]
        self.values = [drawn(max(used, 2), heads, PAGE, size) for _ in range(arenas)]
        for row, position in enumerate(positions):  # what is not yet written must not be read
            if position >= 0:
                for own in (self.keys[-1], self.values[-1]):
                    own[into[row], :, position % PAGE :] = torch.nan
        shapes = (heads * group, heads, heads)
        self.qkv = [drawn(len(positions), 1, each, size).transpose(1, 2) for each in shapes]

    def attended(self, attend: Callable[..., Tensor], **options: Any) -> list[Tensor]:
        """What the rows that there are get, and the arenas afterwards."""
        keys, values = ([each.clone() for each in arenas] for arenas in (self.keys, self.values))
        out = attend(keys, values, self.reads, *self.qkv, **options)
        return [out[self.reads.position >= 0], *keys, *values]


@interpreted
@pytest.mark.parametrize(
    ("dtype", "rounding"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.02)]
)
@pytest.mark.parametrize(("arenas", "heads", "group", "size"), [(1, 2, 1, 16), (2, 1, 3, 24), (3, 2, 2, 64)])
@pytest.mark.parametrize(
    "options", [{"scale": None, "window": None}, {"scale": 0.3, "window": 5}, {"scale": None, "window": 1}]
)
def test_the_kernel_is_the_plain_attention(
    dtype: torch.dtype,
    rounding: float,
    arenas: int,
    heads: int,
    group: int,
    size: int,
    options: dict[str, Any],
) -> None:
    before = (arenas - 1) * PAGE
    positions = [before + each for each in (0, 3, PAGE - 1, PAGE, 3 * PAGE + 2)] + [-1, before + 1, -1]
    step = Step(positions=positions, arenas=arenas, heads=heads, group=group, size=size, dtype=dtype)
    got, right = step.attended(paged.attend, **options), step.attended(plain_paged.attend, **options)
    assert not got[0].isnan().any()
    torch.testing.assert_close(got[0], right[0], rtol=0, atol=rounding)
    for a, b in zip(got[1:], right[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@interpreted
def test_before_it_is_used_it_is_asked_for_a_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    assert paged.knows_a_mean(torch.device("cpu"))
    monkeypatch.setattr(paged, "attend", lambda *given, **named: torch.zeros(1, 1, 1, 16))
    assert not paged.knows_a_mean(torch.device("cpu"))


@interpreted
@pytest.mark.parametrize("case", CASES, ids=[case.label for case in CASES])
def test_every_family_samples_through_the_kernel_as_without_a_cache(case: Case) -> None:
    model, params = tiny_model(case, dtype=torch.float64)
    prompts = [[1, 2, 3, 4, 5, 6][:length] for length in (6, 6, 2, 5)]
    index = torch.arange(4)
    with (
        mock.patch.object(paged, "available", lambda device: True),
        mock.patch.object(recorded.Steps, "__call__", lambda steps, rows, step: step(rows)),
    ):
        rollout = generate(
            model, params, prompts, law=sampling_law, max_new_tokens=6, stop_ids=[7], seed=2,
            prompt_index=index, sample_index=index, slots=3, weights=as_they_are,
        )  # fmt: skip
    mask, states = response_mask(rollout), aligned(model.hidden(params, rollout.tokens))
    again = token_logp(states, model.unembedding(params), rollout.tokens, mask)
    torch.testing.assert_close(rollout.logp, again.float(), rtol=0, atol=1e-5)


@compiled
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["bf16", "fp32", "fp64"])
@pytest.mark.parametrize(("own", "group", "size"), [(0, 1, 64), (2, 3, 64), (1, 4, 128), (2, 1, 24)])
def test_it_compiles_for_a_gpu_and_reads_16_bytes_at_a_time(
    capability: int, dtype: str, own: int, group: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton  # pyright: ignore[reportMissingImports]
    from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]
    from triton.compiler import ASTSource  # pyright: ignore[reportMissingImports]

    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # 3.9 asks for a choice
    function = paged._kernel()
    signature = {name: _type_of(name, dtype) for name in function.arg_names}
    constants = {
        "OWN": own, "HEADS": 4, "GROUP": group, "SIZE": size, "WIDTH": 1 << (size - 1).bit_length(),
        "PAGE": 32, "WIDE": dtype == "fp64", "SCALE": 0.125,
    }  # fmt: skip
    assert set(constants) == {name for name, kind in signature.items() if kind == "constexpr"}
    aligned_to_16 = {
        (number,): [["tt.divisibility", 16]]
        for number, (name, kind) in enumerate(signature.items())
        if kind[0] == "*" or name.endswith(("_row", "_head"))
    }
    positions = {(function.arg_names.index(name),): value for name, value in constants.items()}
    code = triton.compile(
        ASTSource(function, signature, positions, aligned_to_16), target=GPUTarget("cuda", capability, 32)
    )
    assert len(code.asm["cubin"]) > 1000
    wide = "ld.global.v2.b64" if dtype == "fp64" else "ld.global.v4.b32"
    assert code.asm["ptx"].count(wide) >= 2 * (own + 1), "keys and values of each arena"


def _type_of(name: str, dtype: str) -> str:
    if name.isupper():
        return "constexpr"
    if name in ("q", "k", "v", "out") or name.startswith(("keys", "values")):
        return f"*{dtype}"
    return "*i64" if name in paged.Reads._fields else "i64" if name == "window" else "i32"
