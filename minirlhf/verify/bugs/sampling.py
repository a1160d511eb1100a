"""Known bugs of sampling laws."""

import torch
from torch import Tensor

from minirlhf.verify.zoo import Bug


def sampling_law(logits: Tensor, temperature: float = 1.0, top_k: int | None = None,
                 top_p: float | None = None,
                 min_p: float | None = None) -> Tensor:  # fmt: skip
    """Right: log-probs."""
    z = logits / temperature
    if top_k is not None:
        least = z.topk(min(top_k, z.shape[-1]), dim=-1).values[..., -1:]
        z = z.masked_fill(z < least, -torch.inf)
    if top_p is not None:
        ordered, ids = z.softmax(-1).sort(dim=-1, descending=True)
        drop = ordered.cumsum(-1) - ordered >= top_p
        z = z.masked_fill(drop.scatter(-1, ids, drop), -torch.inf)
    if min_p is not None:
        p = z.softmax(-1)
        z = z.masked_fill(p < min_p * p.amax(-1, keepdim=True), -torch.inf)
    return z.log_softmax(-1)


def _law(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "sampling_law", sampling_law, right, wrong, seen)


BUGS = (
    _law("temperature multiplies", "logits / temperature", "logits * temperature"),
    _law("temperature forgotten", "logits / temperature", "logits", "TRL #3029, #4159: in the scorer"),
    _law("square root of the temperature", "logits / temperature", "logits / temperature**0.5"),
    _law("probabilities are tempered and not renormalised", "return z.log_softmax(-1)",
         "return logits.log_softmax(-1) / temperature"),
    _law("raw log-probs returned", "return z.log_softmax(-1)", "return logits.log_softmax(-1)",
         "bugs G07: under top-p"),
    _law("not renormalised after the filters", "return z.log_softmax(-1)",
         "return (logits / temperature).log_softmax(-1).masked_fill(z == -torch.inf, -torch.inf)",
         "bugs G07"),
    _law("top-p drops the token that crosses", "ordered.cumsum(-1) - ordered >= top_p",
         "ordered.cumsum(-1) >= top_p",
         "esm #360, fish-speech #1171, C2C #21"),
    _law("top-p keeps one token too many", "ordered.cumsum(-1) - ordered >= top_p",
         "ordered.cumsum(-1) - 2 * ordered >= top_p"),
    _law("nucleus of the least probable tokens", "descending=True", "descending=False"),
    _law("top-p mask left in sorted order", "drop.scatter(-1, ids, drop)", "drop"),
    _law("top-p threshold of the complement", "ordered >= top_p", "ordered >= 1 - top_p"),
    _law("cumulative sum over the batch", "ordered.cumsum(-1)", "ordered.cumsum(0)"),
    _law("top-p on each probability", "ordered.cumsum(-1) - ordered >= top_p", "ordered < 1 - top_p"),
    _law("top-p of the law before the temperature", "z.softmax(-1).sort", "logits.softmax(-1).sort",
         "a filter that does not see what is drawn from"),
    _law("top-k drops the k-th token", "z < least", "z <= least"),
    _law("top-k keeps the bottom", "z < least", "z > least"),
    _law("top-k keeps one token less", "min(top_k, z.shape[-1])", "max(1, min(top_k, z.shape[-1]) - 1)"),
    _law("top-k keeps one token more", "min(top_k, z.shape[-1])", "min(top_k + 1, z.shape[-1])"),
    _law("top-k of the smallest", "z.topk(min(top_k, z.shape[-1]), dim=-1)",
         "z.topk(min(top_k, z.shape[-1]), dim=-1, largest=False)"),
    _law("top-k threshold over the batch", "values[..., -1:]", "values.amin()"),
    _law("excluded tokens get logit 0", "z.masked_fill(z < least, -torch.inf)",
         "z.masked_fill(z < least, 0.0)"),
    _law("excluded tokens stay a little possible", "drop.scatter(-1, ids, drop), -torch.inf)",
         "drop.scatter(-1, ids, drop), -20.0)"),
    _law("min-p without the largest probability", "min_p * p.amax(-1, keepdim=True)", "min_p"),
    _law("min-p of the largest of the batch", "p.amax(-1, keepdim=True)", "p.amax()"),
    _law("min-p on logits", "p < min_p * p.amax(-1, keepdim=True)", "z < min_p * z.amax(-1, keepdim=True)"),
    _law("min-p keeps what it should drop", "p < min_p", "p > min_p"),
    _law("min-p relative to the mean", "p.amax(-1, keepdim=True)", "p.mean(-1, keepdim=True)"),
    _law("softmax over the batch", "return z.log_softmax(-1)", "return z.log_softmax(0)"),
)  # fmt: skip
