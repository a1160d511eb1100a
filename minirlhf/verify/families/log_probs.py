"""Log-probs of tokens from logits: aligned already, or of a sequence whose logits predict the next token."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from minirlhf.verify.families.ratios import MASK_NAMES
from minirlhf.verify.kinds import (
    Argument,
    Ask,
    Case,
    Claim,
    Counts,
    Dialect,
    Kind,
    Law,
    Layout,
    Mask,
    Numbers,
    Options,
    Probed,
    Reals,
)
from minirlhf.verify.laws import (
    NAN_SAFE,
    batch_laws,
    bounded,
    empty_row_law,
    finite_at,
    formula,
    golden,
    gradient,
    invariance,
    mask_laws,
    numeric_laws,
    rows_of,
)
from minirlhf.verify.token_laws import counted, micro_batches, token_order, weights

CHAIN = "the chain rule, log π(y|x) = Σ log π(yₜ|x, y₍<t₎)"
ANY_ID = "any id under the mask"
LOGITS = Argument("logits", ("B", "T", "V"), Reals(-4.0, 4.0), "z of each position",
                  synonyms=("logit", "lm_logits", "output_logits", "scores", "policy_logits",
                            "all_logits"))  # fmt: skip
TOKENS = Argument("tokens", ("B", "T"), Counts(0, 11), "the id of each token",
                  synonyms=("labels", "label", "input_ids", "ids", "token_ids", "targets", "target", "index",
                            "actions",
                            "sequences", "output_ids", "label_ids", "indices", "completion_ids"))  # fmt: skip
TEMPERATURE = Argument("temperature", (), Numbers((0.5, 2.0, 1.3)), "τ > 0, which divides the logits",
                       optional=True,
                       neutral=lambda case: 1.0,
                       synonyms=("temp", "tau", "t", "sampling_temperature"))  # fmt: skip


def _arguments(shift: int) -> tuple[Argument, ...]:
    def everywhere(case: Case) -> Tensor:
        mask = torch.ones_like(case["tokens"], dtype=torch.bool)
        mask[:, :shift] = False
        return mask

    mask = Argument("mask", ("B", "T"), Mask(), "True = counts" + ", False at slot 0" * shift,
                    neutral=everywhere,
                    synonyms=MASK_NAMES)  # fmt: skip
    return (LOGITS, TOKENS, mask, TEMPERATURE)


def _oracle(shift: int) -> Callable[[Case, Options], Tensor]:
    def oracle(case: Case, options: Options) -> Tensor:
        row, place = case["mask"].nonzero(as_tuple=True)
        z = case["logits"][row, place - shift] / case.get("temperature", 1.0)
        most = z.detach().amax(-1, keepdim=True)
        log_sum = (z - most).exp().sum(-1).log() + most[:, 0]
        chosen = z[torch.arange(len(z)), case["tokens"][row, place]]
        return torch.zeros(case["mask"].shape, dtype=z.dtype).index_put((row, place), chosen - log_sum)

    return oracle


def _arranged(shift: int) -> Callable[[Case], Case]:
    def arrange(case: Case) -> Case:
        mask = case["mask"].clone()
        mask[:, :shift] = False
        mask[~mask.any(-1), -1] = True  # no row is empty
        return {**case, "mask": mask, "tokens": case["tokens"] % case["logits"].shape[-1]}

    return arrange


def _read(case: Case, shift: int) -> Tensor:
    """The positions of the logits that tokens under the mask are read from: [B, T] bool."""
    read = torch.zeros_like(case["mask"])
    row, place = case["mask"].nonzero(as_tuple=True)
    read[row, place - shift] = True
    return read


def _total(f: Probed, single: Case) -> Tensor:
    """log π of the whole of one sequence, whatever the subject's reduction."""
    ones = counted(torch.ones(single["mask"].shape, dtype=torch.float64), single)
    return f.value(single).sum() * ones.sum() / f.reduced(ones, single).sum()


def _footprint(shift: int) -> Callable[[Probed, Case], Iterator[Claim]]:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        got = f.grad(case, "logits").abs().sum(-1).gt(1e-12).double()
        why = "1 where logits have a gradient: where they predict a token under the mask"
        take = ".abs().sum(-1).gt(1e-12).double()"
        yield Claim(case, got, "==", _read(case, shift).double(), why, wrt="logits", take=take)

    return check


def _softmax_gradient(shift: int) -> Callable[[Probed, Case], Iterator[Claim]]:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        got, tau = f.grad(case, "logits"), case.get("temperature", 1.0)
        read = torch.softmax(case["logits"] / tau, -1)
        want = torch.zeros_like(got)
        weight = weights(f, case)
        for row, place in case["mask"].nonzero().tolist():
            one_hot = torch.nn.functional.one_hot(case["tokens"][row, place], got.shape[-1])
            want[row, place - shift] = weight[row, place] * (one_hot - read[row, place - shift]) / tau
        yield Claim(case, got, "==", want, "(one-hot of the token - softmax) / τ", wrt="logits")

    return check


def _normalised(shift: int) -> Callable[[Probed, Case], Iterator[Claim]]:
    """All two-token sequences over the vocabulary, from the same logits."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        vocabulary, width = case["logits"].shape[-1], 2 + shift
        ids = torch.cartesian_prod(torch.arange(vocabulary), torch.arange(vocabulary))
        tokens = torch.cat([torch.zeros(len(ids), shift, dtype=torch.int64), ids], 1)
        logits = torch.stack(
            [case["logits"][0, 0], case["logits"][-1, -1].flip(0), case["logits"][0, -1] * 0.5]
        )[:width]
        mask = torch.ones(1, width, dtype=torch.bool)
        mask[:, :shift] = False
        there = case | {"logits": logits[None], "mask": mask}
        total = sum(_total(f, there | {"tokens": row[None]}).exp() for row in tokens)
        yield Claim(there | {"tokens": tokens[:1]}, (torch.as_tensor(total) - 1).abs() < 1e-4, "holds", None,
                    "the probabilities of all continuations of this length sum to 1")  # fmt: skip

    return check


def _concatenation(f: Probed, case: Case) -> Iterator[Claim]:
    single = rows_of(_arguments(0), case, torch.tensor([0]))
    first = single["mask"] & (single["mask"].cumsum(-1) == 1)
    rest = single["mask"] & ~first
    if bool(rest.any()):
        parts = _total(f, single | {"mask": first}) + _total(f, single | {"mask": rest})
        why = "log π(y₁ y₂) = log π(y₁) + log π(y₂|y₁)"
        yield Claim(single, (_total(f, single) - parts).abs() < 1e-4, "holds", None, why)


def _unread(shift: int, filler: float | None) -> Callable[[Probed, Case], Iterator[Claim]]:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        other = (
            (7.3 * case["logits"] + 1).sin() * 5
            if filler is None
            else torch.full_like(case["logits"], filler)
        )
        changed = case | {"logits": torch.where(_read(case, shift)[..., None], case["logits"], other)}
        why = "logits that predict no token under the mask do not matter" + (", NaN or not" if filler else "")
        yield Claim(changed, f.value(changed), "==", f.value(case), why)
        yield Claim(changed, f.grad(changed, "logits"), "==", f.grad(case, "logits"), why, wrt="logits")

    return check


def _other_ids(ids: Callable[[Case], Tensor]) -> Callable[[Probed, Case], Iterator[Claim]]:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        changed = case | {"tokens": torch.where(case["mask"], case["tokens"], ids(case))}
        why = "ids under the mask do not matter"
        yield Claim(changed, f.value(changed), "==", f.value(case), why)
        yield Claim(changed, f.grad(changed, "logits"), "==", f.grad(case, "logits"), why, wrt="logits")

    return check


def _permuted(case: Case) -> Case:
    order = torch.arange(case["logits"].shape[-1]).flip(0)
    return case | {"logits": case["logits"][..., order], "tokens": order[case["tokens"]]}


def _offset(case: Case) -> Case:
    place = torch.arange(case["tokens"].numel(), dtype=torch.float64).reshape(*case["tokens"].shape, 1)
    return case | {"logits": case["logits"] + (3 * place).cos() * 2}


def _left_padded(f: Probed, case: Case) -> Iterator[Claim]:
    logits, tokens, mask = case["logits"], case["tokens"], case["mask"]
    changed = case | {
        "logits": torch.cat([logits[:, :2] * 0.5 + 1, logits], 1),
        "tokens": torch.cat([torch.zeros_like(tokens[:, :2]), tokens], 1),
        "mask": torch.cat([torch.zeros_like(mask[:, :2]), mask], 1),
    }
    value, got, why = f.value(case), f.value(changed), "as many columns of padding on the left change nothing"
    want = value if value.ndim else value + f.expected(changed) - f.expected(case)
    yield Claim(changed, got[:, -mask.shape[1] :] if got.ndim == 2 else got, "==", want, why)


def _uniform(f: Probed, case: Case) -> Iterator[Claim]:
    even = case | {"logits": torch.full_like(case["logits"], 0.7)}
    chance = torch.full(case["mask"].shape, -math.log(case["logits"].shape[-1]), dtype=torch.float64)
    want = f.reduced(counted(chance, case), case)
    yield Claim(even, f.value(even), "==", want, "all logits alike: -log V")


def _temperature(f: Probed, case: Case) -> Iterator[Claim]:
    for tau in (0.5, 1.7):
        hot = case | {"temperature": tau}
        cold = case | {"logits": case["logits"] / tau, "temperature": 1.0}
        yield Claim(hot, f.value(hot), "==", f.value(cold), "temperature τ is logits / τ")
    plain = {name: value for name, value in case.items() if name != "temperature"}
    yield Claim(plain, f.value(plain), "==", f.value(plain | {"temperature": 1.0}), "temperature 1 is none")


def _difference(shift: int) -> Callable[[Probed, Case], Iterator[Claim]]:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        one = case["tokens"]
        other = (one + 1) % case["logits"].shape[-1]
        read = case["logits"][:, : one.shape[1] - shift]
        gap = torch.zeros(one.shape, dtype=read.dtype)
        ids = torch.stack([one, other], -1)[:, shift:]
        gap[:, shift:] = -read.gather(-1, ids).diff(dim=-1)[..., 0] / case.get("temperature", 1.0)
        want = f.value(case) - f.reduced(counted(gap, case), case)
        changed = case | {"tokens": other}
        why = "two tokens differ by the difference of their logits: the normaliser is the same"
        yield Claim(changed, f.value(changed), "==", want, why)

    return check


def _extreme_cases(shift: int, *sizes: float) -> list[Case]:
    """Logits of which some, not the token's own where they are infinite, have these sizes."""
    generator, cases = torch.Generator().manual_seed(7), []
    for size in sizes:
        logits = 3 * torch.randn(3, 4, 5, generator=generator, dtype=torch.float64)
        tokens = torch.randint(0, 5, (3, 4), generator=generator)
        mask = torch.ones(3, 4, dtype=torch.bool)  # of everything that can count: a subject may have no mask
        mask[:, :shift] = False
        case = {"logits": logits, "tokens": tokens, "mask": mask}
        extreme = (logits > 1) & _read(case, shift)[..., None]
        if math.isinf(size):
            row, place = mask.nonzero(as_tuple=True)
            extreme[row, place - shift, tokens[row, place]] = False
        cases.append(case | {"logits": torch.where(extreme, size, logits)})
    return cases


def _measured_temperature(shift: int) -> Callable[[Ask], float | None]:
    def measure(ask: Ask) -> float | None:
        logits = torch.tensor([[[0.0, 2.0]] * 2], dtype=torch.float64)
        mask = torch.tensor([[False, True]])
        logp = -abs(ask({"logits": logits, "tokens": torch.ones(1, 2, dtype=torch.int64), "mask": mask}))
        tau = 2 / (logp - math.log1p(-math.exp(logp)))
        return None if abs(tau - 1) < 1e-5 else tau

    return measure


def _golden(shift: int) -> tuple[Case, Tensor]:
    """p = (1/8, 1/4, 5/8) and its reverse, and the log-probs of the tokens 2, 1, 0."""
    p = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64).log()
    rows = [p, p.flip(0), p + 3]
    logits = torch.stack([*rows, torch.zeros(3).double()] if shift else rows)[None]
    tokens = torch.tensor([[0] * shift + [2, 1, 0]])
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, :shift] = False
    want = torch.tensor(
        [[0.0] * shift + [math.log(5 / 8), math.log(1 / 4), math.log(1 / 8)]], dtype=torch.float64
    )
    return {"logits": logits, "tokens": tokens, "mask": mask}, want


def _laws(shift: int) -> tuple[Law, ...]:
    arguments = _arguments(shift)
    padded = next(law for law in mask_laws(arguments, differentiable=()) if law.name == "padding_amount")
    zeros = next(law for law in mask_laws(arguments, differentiable=()) if law.name == "zero_under_mask")
    case, want = _golden(shift)
    return (
        formula("log π(token) = z[token] / τ - log Σ exp(z / τ)", "oracles SL2; bugs P6: loop oracle"),
        gradient("logits", "∂/∂z = (one-hot - softmax) / τ at the position that predicts the token",
                 "oracles SL4"),
        golden("golden_tokens", case, want, "tokens 2, 1, 0 under (1, 2, 5)/8 and its reverse",
               "oracles SL2"),
        Law("footprint", "gradient", "exactly the logits that predict a token under the mask have a gradient",
            "oracles SL4; bugs P5, A01, A03, B03", _footprint(shift)),
        Law("softmax_gradient", "gradient",
            "the gradient is one-hot minus softmax, so that it sums to 0 over the tokens",
            "oracles SL4", _softmax_gradient(shift)),
        Law("normalised", "identity", "over all continuations of a length the probabilities sum to 1",
            "oracles SL1; bugs A05, P6", _normalised(shift)),
        Law("concatenation", "identity", "log π(y₁ y₂) = log π(y₁) + log π(y₂|y₁)", "oracles SL3",
            _concatenation),
        bounded("at_most_0", "limit", "no log-prob is positive", "oracles SL13", "<=",
                lambda c, f: torch.zeros((), dtype=torch.float64)),
        Law("uniform", "limit", "where all logits are alike, -log V", "oracles SL2", _uniform),
        Law("the_token_itself", "identity",
            "two tokens' log-probs differ by the difference of their logits, over τ",
            "bugs G08: the likeliest token scored; a normaliser that depends on the token",
            _difference(shift)),
        invariance("vocabulary_order", "symmetry", "ids and logits permuted alike: the same",
                   "oracles SL11; bugs P38",
                   _permuted),
        invariance("logit_shift", "symmetry", "a constant added to the logits of a position changes nothing",
                   "oracles SL12", _offset),
        Law("temperature", "identity", "temperature τ is logits / τ, renormalised; τ = 1 is none",
            "oracles SL14; bugs G05: TRL #3029, OpenRLHF #853", _temperature, ("temperature",)),
        Law("causal", "mask", "logits that predict no counted token do not matter", "oracles SL5; bugs A02",
            _unread(shift, None), ("mask",)),
        Law("nan_unread", "mask",
            "NaN where no counted token is predicted changes neither value nor gradient",
            "oracles SL16; bugs B15", _unread(shift, math.nan), ("mask",), proves=NAN_SAFE),
        Law("pad_id", "mask", "the ids of tokens under the mask do not matter", "bugs P1, B01, B06",
            _other_ids(lambda c: (c["tokens"] + 1) % c["logits"].shape[-1]), ("mask",)),
        Law("any_pad_id", "mask", "nor do ids that are no tokens",
            "bugs B01: -100, or the id of a larger vocabulary",
            _other_ids(lambda c: torch.full_like(c["tokens"], 10_000)), ("mask",), proves=ANY_ID),
        Law("left_padding", "mask", "padding on the left changes nothing", "oracles SL7; bugs A13",
            _left_padded,
            ("mask",)),
        padded,
        zeros,
        empty_row_law(arguments),
        finite_at("stable", "logits of ±10,000 and ±800 are nothing special",
                  "bugs P21: exp overflows, softmax underflows",
                  lambda: _extreme_cases(shift, 1e4, -1e4, 800.0, -800.0), gradients=("logits",)),
        finite_at("excluded_entries",
                  "entries of the vocabulary at -inf leave value and gradient finite and right",
                  "bugs L01, P21", lambda: _extreme_cases(shift, -math.inf), gradients=("logits",)),
        micro_batches(arguments),
        *batch_laws(arguments),
        *numeric_laws(("logits",)),
    )  # fmt: skip


def _kind(name: str, title: str, shift: int, returns: str) -> Kind:
    labels = Dialect("tokens", "labels: -100 where the mask is False", carries=("mask",),
                     say=lambda case: torch.where(case["mask"], case["tokens"], -100))  # fmt: skip
    shorter = Layout(
        "[B, T-1]: slot j is the log-prob of token j + 1",
        fits=lambda result, case: result.shape == case["tokens"][:, 1:].shape,
        canonical=lambda result: torch.nn.functional.pad(result, (1, 0)),
        code="got = torch.nn.functional.pad(got, (1, 0))  # slot 0, which nothing predicts",
    )
    ordered = () if shift else (token_order(_arguments(0), gradients=("logits",)),)
    return Kind(
        name=name,
        title=title,
        arguments=_arguments(shift),
        returns=returns,
        shape=("B", "T"),
        oracle=_oracle(shift),
        differentiable=("logits",),
        arrange=_arranged(shift),
        reducible=True,
        factors={1.0: "log-probs", -1.0: "negative log-likelihoods"},
        mask="mask",
        sizes={"T": (2, 4)} if shift else {},
        measure={"temperature": _measured_temperature(shift)},
        dialects=(labels,),
        layouts=(shorter,) if shift else (),
        anchor=lambda case: case | {"logits": torch.zeros_like(case["logits"])},
        laws=(*_laws(shift), *ordered),
    )


SEQUENCE_LOGP = _kind("sequence_logp",
                      "log π of each token of a sequence: the logits of slot t - 1 predict token t", 1,
                      "[B, T] in nats, slot 0 unused")  # fmt: skip
TOKEN_LOGP = _kind(
    "token_logp", "log π of each token, from logits that are aligned with the tokens", 0, "[B, T] in nats"
)

KINDS = (SEQUENCE_LOGP, TOKEN_LOGP)
