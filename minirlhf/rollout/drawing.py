"""From logits to tokens and their two log-probs: by the compiled kernels where these can, else by torch."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minirlhf.kernels import cpu
from minirlhf.objectives.sampling import sampling_law, tempered
from minirlhf.rollout.draw import BOUNDARY, inverse_cdf


class Drawn(NamedTuple):
    """token, near_boundary: [B] as of `inverse_cdf`. logp, law_logp: fp32 [B] of model and law."""

    token: Tensor
    near_boundary: Tensor
    logp: Tensor
    law_logp: Tensor


def drawn(logits: Tensor, law: Callable[[Tensor], Tensor], uniform: Tensor) -> Drawn:
    """One token of each row of logits fp32 [B, V] by `inverse_cdf`; the kernels sum in another order.

    Of a softmax at some temperature one pass makes all four. Any other law is asked for its log-probs.
    """
    by_kernel, temperature = _by_kernel(logits), temperature_of(law)
    if by_kernel and temperature is not None:
        return Drawn(*cpu.draw_tempered(logits, temperature, uniform, BOUNDARY))
    law_logp = law(logits)
    kernel_draws = by_kernel and _by_kernel(law_logp)
    token, near = cpu.draw(law_logp, uniform, BOUNDARY) if kernel_draws else inverse_cdf(law_logp, uniform)
    column = token[:, None]
    normaliser = cpu.logsumexp(logits) if by_kernel else logits.logsumexp(-1)
    logp = logits.gather(1, column)[:, 0] - normaliser
    return Drawn(token, near, logp, law_logp.gather(1, column)[:, 0].float())


def temperature_of(law: Callable[..., Any]) -> float | None:
    """Of a law that is softmax(z / T), as `objectives.sampling` makes it, and nothing else; otherwise None.

    >>> temperature_of(partial(sampling_law, temperature=0.7, top_k=None)), temperature_of(sampling_law)
    (0.7, 1.0)
    >>> temperature_of(partial(sampling_law, top_k=5)), temperature_of(lambda z: tempered(z, temperature=1))
    (None, None)
    """
    options: dict[str, Any] = {}
    if isinstance(law, partial) and not law.args:
        law, options = law.func, law.keywords
    if law not in (sampling_law, tempered) or any(
        option is not None for name, option in options.items() if name != "temperature"
    ):
        return None
    return float(options.get("temperature", 1.0))


def _by_kernel(rows: Tensor) -> bool:
    return rows.device.type == "cpu" and rows.dtype == torch.float32 and cpu.available()
