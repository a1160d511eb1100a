"""The law that a sampler draws from: temperature, top-k, top-p and min-p.

Cases hold no two equal logits, since how ties are broken is a choice; a law of its own asks for the ties.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from minirlhf.verify.families import sampling_laws as laws
from minirlhf.verify.kinds import (
    Argument,
    Case,
    Convention,
    Kind,
    Numbers,
    Options,
    Reals,
)
from minirlhf.verify.laws import batch_laws, formula, numeric_laws

ORDERS = {
    "ours": "temperature → top-k → top-p → min-p, each on the law that the one before left",
    "min-p first": "temperature → min-p → top-k → top-p, each on the law that the one before left",
    "temperature last": "top-k → top-p → min-p → temperature, each on the law that the one before left",
    "joint": "temperature, then every filter on the whole law; what all keep is kept",
}
OUTPUTS = {
    "logp": "log-probs, -inf for excluded tokens",
    "p": "probabilities",
    "logits": "logits that are not normalised, -inf for excluded tokens",
}

LOGITS = Argument(
    "logits",
    ("N", "V"),
    Reals(-3.0, 3.0),
    "logits, or log-probs; -inf excludes a token",
    synonyms=("logit", "scores", "logprobs", "log_probs", "next_token_logits", "x"),
)
TEMPERATURE = Argument(
    "temperature",
    (),
    Numbers((1.0, 0.5, 0.7, 2.0), usual=(1.0, 0.7, 0.8, 0.6, 0.9, 0.5, 1.2)),
    "T > 0, divides the logits",
    synonyms=("temp", "t", "tau"),
)
TOP_K = Argument(
    "top_k",
    (),
    Numbers((1, 2, 3)),
    "how many tokens are kept, at least 1",
    optional=True,
    neutral=lambda case: case["logits"].shape[-1],
    synonyms=("k", "topk"),
)
TOP_P = Argument(
    "top_p",
    (),
    Numbers((0.3, 0.55, 0.83, 0.95)),
    "the mass of the nucleus, in (0, 1]",
    optional=True,
    neutral=lambda case: 1.0,
    synonyms=("p", "topp", "nucleus_p"),
)
MIN_P = Argument(
    "min_p",
    (),
    Numbers((0.05, 0.2, 0.45)),
    "least probability, relative to the largest",
    optional=True,
    neutral=lambda case: 0.0,
    synonyms=("minp",),
)
ARGUMENTS = (LOGITS, TEMPERATURE, TOP_K, TOP_P, MIN_P)


# Of the large generic cases: whatever filters a subject has, on one of them the orders differ if they can.
_EVERYTHING = {
    4: {"temperature": 2.0, "top_k": 3, "top_p": 0.83, "min_p": 0.1},
    5: {"temperature": 2.0, "top_k": 2, "top_p": 0.65, "min_p": 0.2},
    6: {"temperature": 2.0, "top_k": 3, "top_p": 0.55, "min_p": 0.45},
}


def _arranged(case: Case) -> Case:
    """No ties; k within the vocabulary; the large generic cases use every option at once."""
    z = case["logits"]
    rows, size = z.shape
    if any(len(row.unique()) < size for row in z):
        z = z + torch.arange(size, dtype=torch.float64) / 64
    arranged = {**case, **(_EVERYTHING[size] if rows >= 5 else {}), "logits": z}
    if "top_k" in arranged:
        arranged["top_k"] = min(arranged["top_k"], size)
    return arranged


def _kept_by_k(z: Tensor, k: float) -> set[int]:
    return set(z.sort(descending=True, stable=True).indices[: int(k)].tolist())


def _kept_by_p(z: Tensor, mass: float) -> set[int]:
    """The fewest most probable tokens that hold the mass: the one that crosses it is among them."""
    kept, total = set(), 0.0
    for token in z.sort(descending=True, stable=True).indices.tolist():
        if total >= mass and mass < 1:
            break
        kept.add(token)
        total += torch.softmax(z, dim=0)[token].item()
    return kept


def _kept_by_min_p(z: Tensor, share: float) -> set[int]:
    p = torch.softmax(z, dim=0)
    return {token for token in range(len(z)) if p[token] >= share * p.max()}


_RULES: dict[str, Callable[[Tensor, float], set[int]]] = {
    "top_k": _kept_by_k,
    "top_p": _kept_by_p,
    "min_p": _kept_by_min_p,
}


def _filtered(z: Tensor, case: Case, order: str) -> Tensor:
    """The logits of one position, -inf where a filter excludes the token: [V]."""
    names = ("min_p", "top_k", "top_p") if order == "min-p first" else ("top_k", "top_p", "min_p")
    whole = z
    for name in names:
        if name in case:
            kept = _RULES[name](whole if order == "joint" else z, case[name])
            z = torch.stack([z[v] if v in kept else z.new_tensor(-math.inf) for v in range(len(z))])
    return z


_RETURNED: dict[str, Callable[[Tensor], Tensor]] = {
    "logp": lambda z: z.log_softmax(dim=0),
    "p": lambda z: z.softmax(dim=0),
    "logits": lambda z: z,
}


def _sampling_law(case: Case, options: Options) -> Tensor:
    """Position by position."""
    temperature, order, rows = case["temperature"], options["order"], []
    for z in case["logits"]:
        last = order == "temperature last"
        z = _filtered(z, case, order) / temperature if last else _filtered(z / temperature, case, order)
        rows.append(_RETURNED[options["output"]](z))
    return torch.stack(rows)


_SINGLE, _HALF, _PURE = numeric_laws(["logits"])

SAMPLING_LAW = Kind(
    name="sampling_law",
    title="the law that a sampler draws from: temperature, top-k, top-p, min-p",
    arguments=ARGUMENTS,
    returns="[N, V] log-probs of the tokens",
    shape=("N", "V"),
    oracle=_sampling_law,
    arrange=_arranged,
    conventions=(Convention("output", OUTPUTS), Convention("order", ORDERS)),
    sizes={"V": (2, 5), "N": (1, 3)},
    laws=(
        formula("softmax of z/T on the tokens that the filters keep", laws.HOLTZMAN),
        laws.normalised(),
        laws.off_support(),
        laws.best_kept(),
        laws.golden(
            "golden_nucleus",
            {"top_p": 0.7},
            (0.625, 0.375, 0.0, 0.0),
            "oracles S2; bugs J01: the token that crosses p is kept",
        ),
        laws.golden("golden_top_k", {"top_k": 3}, (0.526316, 0.315789, 0.157895, 0.0), "oracles S1"),
        laws.golden("golden_min_p", {"min_p": 0.4}, (0.625, 0.375, 0.0, 0.0), laws.NGUYEN),
        laws.golden(
            "golden_temperature", {"temperature": 0.5}, (0.684932, 0.246575, 0.061644, 0.006849), "oracles S1"
        ),
        laws.ratios(),
        laws.most_probable(),
        laws.temperature_scales(),
        laws.limits(),
        laws.kept(
            "top_k_count", "k = 2 leaves two tokens", "arXiv:1805.04833", {"top_k": 2}, laws.two_tokens
        ),
        laws.kept("top_one", "k = 1 is greedy", "oracles S5", {"top_k": 1}, laws.only_the_best),
        laws.plain("all_k", "k = V filters nothing", lambda c: {"top_k": c["logits"].shape[-1]}, ("top_k",)),
        laws.plain(
            "beyond_k",
            "k > V filters nothing",
            lambda c: {"top_k": c["logits"].shape[-1] + 3},
            ("top_k",),
            laws.BEYOND,
        ),
        laws.kept(
            "nucleus_mass",
            "the nucleus of .55 holds at least .55",
            laws.HOLTZMAN,
            {"top_p": 0.55},
            laws.enough_mass,
        ),
        laws.kept(
            "nucleus_minimal",
            "without its least token the nucleus of .83 holds less than .83",
            laws.HOLTZMAN,
            {"top_p": 0.83},
            laws.minimal,
        ),
        laws.kept(
            "smallest_nucleus",
            "a nucleus of .001 is the most probable token",
            "bugs J01",
            {"top_p": 0.001},
            laws.only_the_best,
        ),
        laws.plain("whole_nucleus", "p = 1 filters nothing", lambda c: {"top_p": 1.0}, ("top_p",)),
        laws.nested(),
        laws.kept(
            "min_p_rule",
            "min-p .2 keeps what has at least a fifth of the largest probability",
            laws.NGUYEN,
            {"min_p": 0.2},
            laws.at_least_a_fifth,
        ),
        laws.plain("no_min_p", "min-p 0 filters nothing", lambda c: {"min_p": 0.0}, ("min_p",)),
        laws.plain("no_filter", "without filters it is the softmax of z/T", lambda c: {}),
        laws.shift(),
        laws.flipped(),
        *laws.ties(),
        laws.excluded(),
        laws.extreme(),
        laws.gradient(),
        *batch_laws(ARGUMENTS, axis="N"),
        _SINGLE,
        _HALF,
        _PURE._replace(proves=laws.PURE),
    ),
)

KINDS = (SAMPLING_LAW,)
