"""Known bugs of masked reductions and of gradient accumulation."""

import torch
from torch import Tensor

from minirlhf.verify.zoo import Bug


def token_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Right."""
    kept = torch.where(mask, x, 0.0)
    total, count = kept.sum(), mask.sum()
    return total / count.clamp(min=1)


def sequence_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Right."""
    kept = torch.where(mask, x, 0.0)
    length = mask.sum(-1).clamp(min=1)
    return kept.sum(-1) / length


def mean_of_sequence_means(x: Tensor, mask: Tensor) -> Tensor:
    """Right: averaged over the sequences too."""
    kept = torch.where(mask, x, 0.0)
    per_row = kept.sum(-1) / mask.sum(-1)
    return per_row.mean()


def sequence_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Right."""
    kept = torch.where(mask, x, 0.0)
    return kept.sum(-1)


def gradient_accumulation(losses: Tensor, mask: Tensor, *, micro_batch_size: int) -> Tensor:
    """Right: the token mean of the batch."""
    total, count = losses.new_zeros(()), mask.sum()
    steps = range(0, len(losses), micro_batch_size)
    for start in steps:
        rows = slice(start, start + micro_batch_size)
        part = torch.where(mask[rows], losses[rows], 0.0)
        total = total + part.sum() / count
    return total


def sequence_accumulation(losses: Tensor, mask: Tensor, *, micro_batch_size: int) -> Tensor:
    """Right: the mean over sequences of token means."""
    total = losses.new_zeros(())
    for part, kept in zip(losses.split(micro_batch_size), mask.split(micro_batch_size), strict=True):
        per_row = torch.where(kept, part, 0.0).sum(-1) / kept.sum(-1)
        total = total + per_row.mean() * len(part) / len(losses)
    return total


def _token(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "token_mean", token_mean, right, wrong, seen)


def _row(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "sequence_mean", sequence_mean, right, wrong, seen)


def _rows(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "sequence_mean", mean_of_sequence_means, right, wrong, seen)


def _sum(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "sequence_sum", sequence_sum, right, wrong, seen)


def _steps(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "gradient_accumulation", gradient_accumulation, right, wrong, seen)


def _parts(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "gradient_accumulation", sequence_accumulation, right, wrong, seen)


BUGS = (
    _token("mean of sequence means", "total / count.clamp(min=1)",
           "(kept.sum(-1) / mask.sum(-1).clamp(min=1)).mean()", "verl #931: mode mislabelled"),
    _token("mean over the padding too", "mask.sum()\n", "torch.tensor(mask.numel())\n", "SkyRL #1305"),
    _token("unmasked sum", "torch.where(mask, x, 0.0)", "x", "TRL #6809"),
    _token("divided by the batch size", "mask.sum()\n", "torch.tensor(len(mask))\n"),
    _token("sum", "total / count.clamp(min=1)", "total", "HALOs e8c4e34"),
    _token("count off by one", "count.clamp(min=1)", "(count + 1)"),
    _token("mask inverted", "torch.where(mask, x, 0.0)", "torch.where(mask, 0.0, x)"),
    _token("first column skipped", "kept.sum()", "kept[:, 1:].sum()", "verl #3287"),
    _token("only what is not zero is counted", "mask.sum()\n", "(kept != 0).sum()\n", "HALOs d8fd14f"),
    _token("only what is positive is counted", "mask.sum()\n", "(kept > 0).sum()\n", "HALOs d8fd14f"),
    _token("weights of the values", "mask.sum()\n", "kept.abs().sum()\n", "verl #2506"),
    _token("detached", "torch.where(mask, x, 0.0)", "torch.where(mask, x.detach(), 0.0)"),
    _token("median of the rows", "total / count.clamp(min=1)",
           "(kept.sum(-1) / mask.sum(-1).clamp(min=1)).median()"),
    _rows("token mean", "per_row.mean()", "kept.sum() / mask.sum()", "OpenRLHF 1b23ecf0"),
    _row("length is 1", "mask.sum(-1).clamp(min=1)", "(kept > 10).sum(-1).clamp(min=1)",
         "HALOs d8fd14f: sum(logps > 0)"),
    _row("mean over the padding too", "mask.sum(-1).clamp(min=1)", "mask.shape[-1]", "SkyRL #1305"),
    _row("unmasked sum", "torch.where(mask, x, 0.0)", "x"),
    _row("length of the whole batch", "mask.sum(-1).clamp(min=1)", "mask.sum() / len(mask)"),
    _row("wrong axis on square batches", "kept.sum(-1)",
         "kept.sum(0 if kept.shape[0] == kept.shape[1] else -1)",
         "OpenRLHF #1250"),
    _row("length off by one", "mask.sum(-1).clamp(min=1)", "(mask.sum(-1) - 1).clamp(min=1)", "trlx #401"),
    _row("divided twice", "kept.sum(-1) / length", "kept.sum(-1) / length / length",
         "LLaMA-Factory #6722, tinker #334"),
    _row("length up to the last token", "mask.sum(-1).clamp(min=1)",
         "(mask * (1 + torch.arange(mask.shape[-1]))).amax(-1).clamp(min=1)"),
    _row("cumulative", "kept.sum(-1)", "kept.cumsum(-1).sum(-1)"),
    _row("nonzero counted", "mask.sum(-1).clamp(min=1)", "(kept != 0).sum(-1).clamp(min=1)", "HALOs d8fd14f"),
    _rows("weighed with the length", "per_row.mean()", "(per_row * mask.sum(-1)).sum() / mask.sum(-1).max()"),
    _rows("last row forgotten", "per_row.mean()", "per_row[:-1].sum() / len(per_row)"),
    _sum("averaged", "kept.sum(-1)", "kept.sum(-1) / mask.sum(-1).clamp(min=1)",
         "I02, tinker #334, Liger #693"),
    _sum("unmasked", "torch.where(mask, x, 0.0)", "x", "OpenRLHF #235"),
    _sum("last token dropped", "kept.sum(-1)", "kept[:, :-1].sum(-1)", "trlx #401"),
    _sum("first token dropped", "kept.sum(-1)", "kept[:, 1:].sum(-1)", "verl #3287"),
    _sum("first counted token dropped", "torch.where(mask, x, 0.0)",
         "torch.where(mask & (mask.cumsum(-1) > 1), x, 0.0)", "verl #3287"),
    _sum("summed over the batch", "kept.sum(-1)", "kept.sum(0 if kept.shape[0] == kept.shape[1] else -1)",
         "OpenRLHF #1250"),
    _sum("maximum", "kept.sum(-1)", "kept.amax(-1)"),
    _sum("mask in the sum", "kept.sum(-1)", "(kept + mask).sum(-1)"),
    _sum("divided by the longest", "kept.sum(-1)", "kept.sum(-1) / mask.shape[-1]"),
    _steps("means weighed with their rows", "part.sum() / count",
           "part.sum() / mask[rows].sum() * len(part) / len(losses)", "verl #141"),
    _steps("mean of means", "part.sum() / count", "part.sum() / mask[rows].sum() / len(steps)",
           "open-instruct #1161, verl #3994, OpenRLHF #1249, prime-rl #2562"),
    _steps("sum of means", "part.sum() / count", "part.sum() / mask[rows].sum()",
           "TRL #6024: times the steps"),
    _steps("divided inside of the loop", "total = total + part.sum() / count",
           "total = (total + part.sum()) / (count if start == 0 else 1)", "trlx #221"),
    _steps("divided again at every step", "total = total + part.sum() / count",
           "total = (total + part.sum() / count) / (1 if start == 0 else 2)", "trlx #221"),
    _steps("last micro-batch dropped", "range(0, len(losses), micro_batch_size)",
           "range(0, len(losses) - micro_batch_size + 1, micro_batch_size)", "TRL #563, LLaMA-Factory #7576"),
    _steps("only the last micro-batch", "total = total + part.sum() / count", "total = part.sum() / count",
           "TRL #407"),
    _steps("only the last keeps its gradient", "total = total + part", "total = total.detach() + part",
           "open-instruct #1498"),
    _steps("divided by the steps too", "part.sum() / count", "part.sum() / count / len(steps)",
           "TRL #6024, ms-swift #10116"),
    _steps("count of the first micro-batch", "mask.sum()\n", "mask[:micro_batch_size].sum() * len(losses) / "
           "len(losses[:micro_batch_size])\n"),
    _steps("rows overlap", "start + micro_batch_size)", "start + micro_batch_size + 1)"),
    _steps("a row is skipped between", "range(0, len(losses), micro_batch_size)",
           "range(0, len(losses), micro_batch_size + 1)"),
    _parts("parts weighed equally", "per_row.mean() * len(part) / len(losses)",
           "per_row.mean() / len(losses.split(micro_batch_size))", "verl #141"),
    _parts("steps rounded down", "per_row.mean() * len(part) / len(losses)",
           "per_row.mean() / max(1, len(losses) // micro_batch_size)", "OpenRLHF #577"),
    _parts("divided by full micro-batches", "per_row.mean() * len(part) / len(losses)",
           "per_row.sum() / (micro_batch_size * len(losses.split(micro_batch_size)))"),
)  # fmt: skip
