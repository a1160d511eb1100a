"""The laws of sampling laws: which tokens a filter keeps, and that what is left is only renormalised."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from minirlhf.verify.families.exact_kl import logs
from minirlhf.verify.families.vocabulary import DIFFERENTIABLE, MINUS_INFINITY
from minirlhf.verify.kinds import Case, Claim, Law, Probed

HOLTZMAN = "Holtzman et al. 2020, Eq. 2-3 (arXiv:1904.09751)"
TIES = "ties broken by the lowest id"
BEYOND = "k beyond the vocabulary"
PURE = "inputs left alone"


def law_of(f: Probed, case: Case) -> Tensor:
    """The subject's law as probabilities, whatever it returns: [N, V]."""
    got = f.value(case).double()
    return {"logp": got.exp(), "p": got, "logits": torch.softmax(got, dim=-1)}[f.options["output"]]


def _bare(case: Case, **options: float) -> Case:
    """Without filters but for these."""
    return {"logits": case["logits"], "temperature": case["temperature"], **options}


def normalised() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        total = law_of(f, case).sum(-1)
        why = f"the probabilities add up to {total.tolist()}"
        yield Claim(case, (total - 1).abs() < 1e-5, "holds", None, why)

    return Law("normalised", "value", "the probabilities add up to 1", "oracles S1", check)


def off_support() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        law = f.expected(case)
        excluded = (law == 0) if f.options["output"] == "p" else law == -math.inf
        left = torch.where(excluded, law_of(f, case), 0.0)
        yield Claim(case, left == 0, "holds", None, "an excluded token can never be drawn, not even rarely")

    return Law("off_support", "limit", "an excluded token has exactly the probability 0", "oracles S1", check)


def best_kept() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        best = case["logits"].argmax(dim=-1, keepdim=True)
        law = law_of(f, case)
        yield Claim(
            case, law.gather(-1, best) > 0, "holds", None, "the most probable token is never excluded"
        )

    return Law(
        "never_empty",
        "limit",
        "no filter excludes the most probable token",
        "bugs J01: esm #360, fish-speech #1171",
        check,
    )


def ratios() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        law, z = law_of(f, case), case["logits"]
        best = z.argmax(dim=-1, keepdim=True)
        want = (z - z.gather(-1, best)) / case["temperature"]
        got = law.clamp(min=1e-300).log() - law.gather(-1, best).clamp(min=1e-300).log()
        right = (law == 0) | ((got - want).abs() < 1e-3 * (1 + want.abs()))
        yield Claim(
            case, right, "holds", None, "log p(u) - log p(v) is (zᵤ - zᵥ)/T between tokens that are kept"
        )

    return Law(
        "ratios",
        "identity",
        "among the kept tokens the log-odds are the differences of logits over T",
        "each filter only renormalises",
        check,
    )


def most_probable() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        kept, z = law_of(f, case) > 0, case["logits"]
        least = torch.where(kept, z, math.inf).amin(-1)
        most = torch.where(kept, -math.inf, z).amax(-1)
        yield Claim(case, least > most, "holds", None, "no excluded token is more probable than a kept one")

    return Law(
        "most_probable_kept", "symmetry", "every filter keeps the most probable tokens", "oracles S1", check
    )


def flipped() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        changed = {**case, "logits": case["logits"].flip(-1)}
        yield Claim(changed, f.value(changed), "==", f.value(case).flip(-1), "the token ids in reverse")

    return Law(
        "id_permutation",
        "symmetry",
        "token ids are names: another order of ids, the same law",
        "oracles SL11",
        check,
    )


def counted(name: str, statement: str, source: str, options: dict[str, float],
             want: Callable[[Tensor, Case], Tensor], needs: tuple[str, ...]) -> Law:  # fmt: skip
    """Which tokens are possible under these options alone: [N, V] bool, from the plain law at T = 1."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        bare = _bare({**case, "temperature": 1.0} if f.has("temperature") else case, **options)
        kept = law_of(f, bare) > 0
        p = torch.softmax(bare["logits"] / bare["temperature"], dim=-1)
        why = f"{statement}: possible are {kept.tolist()}"
        yield Claim(bare, want(p, {**bare, "kept": kept}), "holds", None, why)

    return Law(name, "limit", statement, source, check, needs)


def plain(name: str, statement: str, source: str, options: Callable[[Case], dict[str, float]],
           needs: tuple[str, ...], proves: str | None = None) -> Law:  # fmt: skip
    """These options leave the tempered law as it is."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        bare = _bare(case)
        changed = {**bare, **options(case)}
        want = torch.softmax(case["logits"] / case["temperature"], dim=-1)
        got = law_of(f, changed)
        yield Claim(changed, (got - want).abs() < 1e-6, "holds", None, f"{statement}; it is {got.tolist()}")

    return Law(name, "identity", statement, source, check, needs, proves)


def temperature_scales() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        bare = _bare(case)
        scaled = {**bare, "logits": case["logits"] / case["temperature"], "temperature": 1.0}
        yield Claim(bare, f.value(bare), "==", f.value(scaled), "z at T is z/T at 1")

    return Law(
        "temperature_divides",
        "identity",
        "without filters, logits at T are logits/T at 1",
        "oracles SL14",
        check,
        ("temperature",),
    )


def limits() -> Law:
    def cases() -> list[Case]:
        z = torch.tensor([[0.0, 1.0, -1.0], [2.0, 1.5, 1.0]], dtype=torch.float64)
        return [{"logits": z, "temperature": t} for t in (0.01, 1000.0)]

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        law, z = law_of(f, case), case["logits"]
        cold = torch.nn.functional.one_hot(z.argmax(-1), 3).double()
        want = cold if case["temperature"] < 1 else torch.full_like(law, 1 / 3)
        yield Claim(case, (law - want).abs() < 1e-2, "holds", None, "T = .01 is greedy, T = 1,000 uniform")

    return Law(
        "temperature_limits",
        "limit",
        "a low temperature is greedy, a high one uniform",
        "oracles S5",
        check,
        ("temperature",),
        cases=cases,
    )


def golden(name: str, options: dict[str, float], law: tuple[float, ...], source: str) -> Law:
    shown = ", ".join(
        f"{key} = {value:g}" for key, value in options.items() if key != "temperature" or value != 1
    )

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        got, want = law_of(f, case), torch.tensor([law], dtype=torch.float64)
        why = f"(.5, .3, .15, .05) with {shown} is {law}; got {[round(x, 6) for x in got[0].tolist()]}"
        yield Claim(case, (got - want).abs() < 1e-5, "holds", None, why)

    needs = tuple(options)
    statement = f"(.5, .3, .15, .05) with {shown} is ({', '.join(f'{p:g}' for p in law)})"
    case: Case = {"logits": torch.tensor([logs(0.5, 0.3, 0.15, 0.05)], dtype=torch.float64), **options}
    return Law(name, "value", statement, source, check, needs, cases=lambda: [case])


def nested() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        kept = [law_of(f, _bare(case, top_p=p)) > 0 for p in (0.3, 0.55, 0.83)]
        for less, more in zip(kept, kept[1:], strict=False):
            yield Claim(
                _bare(case, top_p=0.55), more | ~less, "holds", None, "a larger mass excludes no token more"
            )

    return Law(
        "nested_nuclei",
        "symmetry",
        "a larger top-p keeps all that a smaller one keeps",
        HOLTZMAN,
        check,
        ("top_p",),
    )


def excluded() -> Law:
    z = torch.tensor([[-math.inf, 0.5, 1.0, 0.0], [2.0, -math.inf, -math.inf, 1.0]], dtype=torch.float64)

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        law, want = law_of(f, case), f.expected(case)
        want = {"logp": want.exp(), "p": want, "logits": torch.softmax(want, -1)}[f.options["output"]]
        why = f"tokens with logit -inf stay impossible; the law is {law.tolist()}"
        yield Claim(case, (law - want).abs() < 1e-6, "holds", None, why)

    def cases() -> list[Case]:
        return [{"logits": z, "temperature": 1.0}]

    return Law(
        "excluded_tokens",
        "numeric",
        "a logit of -inf stays impossible",
        "bugs P21",
        check,
        proves=MINUS_INFINITY,
        cases=cases,
    )


def extreme() -> Law:
    z = torch.tensor([[1e4, -1e4, 9999.0], [-1e4, -1e4 - 1, -1e4 - 3]], dtype=torch.float64)

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        got, want = law_of(f, case), torch.softmax(case["logits"], dim=-1)
        yield Claim(case, (got - want).abs() < 1e-6, "holds", None, "at logits of ±10,000 the law is right")

    return Law(
        "extreme_logits",
        "numeric",
        "at logits of ±10,000 the law is finite and right",
        "bugs P21",
        check,
        cases=lambda: [{"logits": z, "temperature": 1.0}],
    )


def ties() -> tuple[Law, Law]:
    z = torch.tensor([[1.0, 2.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0, 1.0]], dtype=torch.float64)

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        law = law_of(f, case)
        kept = law > 0
        enough = (kept.sum(-1) >= 2) & ((law.sum(-1) - 1).abs() < 1e-5) & kept[:, 1:2].any(-1)
        equal = (torch.where(kept[1], law[1], law[1].max()) - law[1].max()).abs().max() < 1e-6
        why = f"with k = 2 two or more of the likeliest are kept, equals with equal chances: {law.tolist()}"
        yield Claim(case, enough.all() & equal & ~kept[0, 4], "holds", None, why)

    def lowest(f: Probed, case: Case) -> Iterator[Claim]:
        kept = law_of(f, case) > 0
        want = torch.tensor([[True, True, False, False, False], [True, True, False, False, False]])
        yield Claim(
            case, kept == want, "holds", None, f"of equal logits the lowest ids are kept: {kept.tolist()}"
        )

    def cases() -> list[Case]:
        return [{"logits": z, "temperature": 1.0, "top_k": 2}]

    return (
        Law(
            "equal_logits",
            "limit",
            "of equal logits at least as many are kept as are asked for",
            "oracles S5",
            check,
            ("top_k",),
            cases=cases,
        ),
        Law(
            "ties",
            "limit",
            "of equal logits those with the lowest ids are kept",
            "oracles S5: ties deterministic",
            lowest,
            ("top_k",),
            proves=TIES,
            cases=cases,
        ),
    )


def gradient() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        bare = _bare(case)
        weight = torch.arange(bare["logits"].numel(), dtype=torch.float64).reshape(bare["logits"].shape).cos()
        x = bare["logits"].detach().clone().requires_grad_()
        z = x / bare["temperature"]
        output = {"logp": z.log_softmax(-1), "p": z.softmax(-1), "logits": z}[f.options["output"]]
        (want,) = torch.autograd.grad((output * weight).sum(), x)
        got = f.grad(bare, "logits", weight)
        yield Claim(bare, got, "==", want, "∂log p(v)/∂zᵤ = (1[u = v] - p(u))/T", wrt="logits")

    return Law(
        "gradient_of_logits",
        "gradient",
        "∂log p(v)/∂zᵤ = (1[u = v] - p(u))/T",
        "oracles SL4",
        check,
        proves=DIFFERENTIABLE,
    )


def _shifted(case: Case) -> Case:
    return {
        **case,
        "logits": case["logits"] + torch.arange(len(case["logits"]), dtype=torch.float64)[:, None] - 1.5,
    }


def shift_law() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        changed = _shifted(case)
        same = (law_of(f, changed) - law_of(f, case)).abs() < 1e-6
        yield Claim(
            changed, same, "holds", None, "a constant added to the logits of a position changes nothing"
        )

    return Law(
        "shift_of_logits",
        "symmetry",
        "a constant added to the logits of a position changes nothing",
        "oracles SL12",
        check,
    )


def mass(p: Tensor, case: Case) -> Tensor:
    return torch.where(case["kept"], p, 0.0).sum(-1)


def without_least(p: Tensor, case: Case) -> Tensor:
    return mass(p, case) - torch.where(case["kept"], p, 1.0).amin(-1)
