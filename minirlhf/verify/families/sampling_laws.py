"""The laws of sampling laws: which tokens a filter keeps, and that what is left is only renormalised."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from minirlhf.verify.families.exact_kl import logs
from minirlhf.verify.families.vocabulary import DIFFERENTIABLE, MINUS_INFINITY
from minirlhf.verify.kinds import Case, Claim, Law, Probed
from minirlhf.verify.laws import table

HOLTZMAN = "Holtzman et al. 2020, Eq. 2-3 (arXiv:1904.09751)"
NGUYEN = "Nguyen et al. 2024 (arXiv:2407.01082)"
TIES = "ties broken by the lowest id"
BEYOND = "k beyond the vocabulary"
PURE = "inputs left alone"
FILTERS = ("top_k", "top_p", "min_p")
CODE = {"logp": ".exp()", "p": "", "logits": ".softmax(-1)"}
"""From what the subject returns to probabilities."""


def law_of(f: Probed, case: Case) -> Tensor:
    """The subject's law as probabilities, whatever it returns: [N, V]."""
    got = f.value(case).double()
    return {"logp": got.exp(), "p": got, "logits": torch.softmax(got, dim=-1)}[f.options["output"]]


def _law_is(f: Probed, case: Case, want: Tensor, why: str, *, loose: float = 1e2) -> Claim:
    return Claim(case, law_of(f, case), "==", want, why, take=CODE[f.options["output"]], loose=loose)


def _possible_are(f: Probed, case: Case, want: Tensor, why: str) -> Claim:
    return Claim(case, law_of(f, case) > 0, "==", want, why, take=CODE[f.options["output"]] + ".gt(0)")


def _filtering(f: Probed, case: Case) -> bool:
    """Whether the subject has a filter built in, which no case can switch off."""
    return any(name in case and not f.has(name) for name in FILTERS)


def _bare(case: Case, **options: float) -> Case:
    """Without filters but for these."""
    return {"logits": case["logits"], "temperature": case["temperature"], **options}


def normalised() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        got, take = law_of(f, case).sum(-1), CODE[f.options["output"]] + ".sum(-1)"
        yield Claim(
            case, got, "==", torch.ones_like(got), "the probabilities add up to 1", take=take, loose=1e2
        )

    return Law("normalised", "value", "the probabilities add up to 1", "oracles S1", check)


def off_support() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        expected = f.expected(case)
        support = expected > 0 if f.options["output"] == "p" else expected > -math.inf
        yield _possible_are(f, case, support, "what is excluded can never be drawn, not even rarely")

    return Law("off_support", "limit", "an excluded token has exactly the probability 0", "oracles S1", check)


def best_kept() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        best = case["logits"].argmax(dim=-1).tolist()
        got = law_of(f, case)[range(len(best)), best] > 0
        take = f"{CODE[f.options['output']]}[range({len(best)}), {best}].gt(0)"
        yield Claim(
            case, got, "==", torch.ones_like(got), "the most probable token is never excluded", take=take
        )

    source = "bugs J01: esm #360, fish-speech #1171"
    return Law("never_empty", "limit", "no filter excludes the most probable token", source, check)


def ratios() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        law, z = law_of(f, case), case["logits"]
        best = z.argmax(dim=-1, keepdim=True)
        want = (z - z.gather(-1, best)) / case["temperature"]
        got = law.clamp(min=1e-300).log() - law.gather(-1, best).clamp(min=1e-300).log()
        right = (law == 0) | ((got - want).abs() < 1e-3 * (1 + want.abs()))
        why = "log p(u) - log p(v) is (zᵤ - zᵥ)/T between tokens that are kept"
        yield Claim(case, right, "holds", None, why)

    statement = "among the kept tokens the log-odds are the differences of logits over T"
    return Law("ratios", "identity", statement, "each filter only renormalises", check)


def most_probable() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        kept, z = law_of(f, case) > 0, case["logits"]
        least = torch.where(kept, z, math.inf).amin(-1)
        most = torch.where(kept, -math.inf, z).amax(-1)
        yield Claim(case, least > most, "holds", None, "no excluded token is more probable than a kept one")

    statement = "every filter keeps the most probable tokens"
    return Law("most_probable_kept", "symmetry", statement, "oracles S1", check)


def flipped() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        changed = {**case, "logits": case["logits"].flip(-1)}
        yield Claim(changed, f.value(changed), "==", f.value(case).flip(-1), "the token ids in reverse")

    statement = "token ids are names: another order of ids, the same law"
    return Law("id_permutation", "symmetry", statement, "oracles SL11", check)


def shift() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        constant = torch.arange(len(case["logits"]), dtype=torch.float64)[:, None] - 1.5
        changed = {**case, "logits": case["logits"] + constant}
        yield _law_is(
            f, changed, law_of(f, case), "a constant added to the logits of a position changes nothing"
        )

    statement = "a constant added to the logits of a position changes nothing"
    return Law("shift_of_logits", "symmetry", statement, "oracles SL12", check)


def kept(
    name: str,
    statement: str,
    source: str,
    options: dict[str, float],
    claim: Callable[[Probed, Case, Tensor], Claim],
) -> Law:
    """What is kept under these options alone; `claim` is given the plain law, [N, V]."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        bare = _bare({**case, "temperature": 1.0} if f.has("temperature") else case, **options)
        if not _filtering(f, case):
            yield claim(f, bare, torch.softmax(bare["logits"] / bare["temperature"], dim=-1))

    return Law(name, "limit", statement, source, check, tuple(options))


def only_the_best(f: Probed, case: Case, p: Tensor) -> Claim:
    """One token is left, the most probable."""
    return _possible_are(f, case, p == p.amax(-1, keepdim=True), "only the most probable token is left")


def two_tokens(f: Probed, case: Case, p: Tensor) -> Claim:
    """Two tokens are left, or all where there are fewer."""
    got, take = (law_of(f, case) > 0).sum(-1), CODE[f.options["output"]] + ".gt(0).sum(-1)"
    return Claim(
        case, got, "==", torch.full_like(got, min(2, p.shape[-1])), "k = 2 leaves two tokens", take=take
    )


def enough_mass(f: Probed, case: Case, p: Tensor) -> Claim:
    """The kept tokens hold at least the mass."""
    got = ((law_of(f, case) > 0) * p).sum(-1)
    take = f"{CODE[f.options['output']]}.gt(0).mul(tensor({p.tolist()})).sum(-1)"
    want = torch.full_like(got, case["top_p"])
    return Claim(
        case, got, ">=", want, "probability under the whole law of what is kept", take=take, loose=10.0
    )


def minimal(f: Probed, case: Case, p: Tensor) -> Claim:
    """Without the least probable one they do not."""
    left = law_of(f, case) > 0
    mass = torch.where(left, p, 0.0).sum(-1) - torch.where(left, p, 1.0).amin(-1)
    why = f"without its least probable token the nucleus still holds {mass.tolist()}"
    return Claim(case, mass < case["top_p"], "holds", None, why)


def at_least_a_fifth(f: Probed, case: Case, p: Tensor) -> Claim:
    """What has a fifth of the largest probability."""
    why = "kept is what has at least a fifth of the largest probability"
    return _possible_are(f, case, p >= 0.2 * p.amax(-1, keepdim=True), why)


def plain(
    name: str,
    statement: str,
    options: Callable[[Case], dict[str, float]],
    needs: tuple[str, ...] = (),
    proves: str | None = None,
) -> Law:
    """These options leave the tempered law as it is."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        if not _filtering(f, case):
            want = torch.softmax(case["logits"] / case["temperature"], dim=-1)
            yield _law_is(f, {**_bare(case), **options(case)}, want, statement)

    return Law(name, "identity", statement, "oracles S3; ChatRWKV #170", check, needs, proves)


def temperature_scales() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        bare = _bare(case)
        scaled = {**bare, "logits": case["logits"] / case["temperature"], "temperature": 1.0}
        if not _filtering(f, case):
            yield Claim(bare, f.value(bare), "==", f.value(scaled), "z at T is z/T at 1")

    statement = "without filters, logits at T are logits/T at 1"
    return Law("temperature_divides", "identity", statement, "oracles SL14", check, ("temperature",))


def limits() -> Law:
    def cases() -> list[Case]:
        return [
            {"logits": table([0.0, 1.0, -1.0], [2.0, 1.5, 1.0]), "temperature": t} for t in (0.01, 1000.0)
        ]

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        z = case["logits"]
        greedy = torch.nn.functional.one_hot(z.argmax(-1), 3).double()
        want = greedy if case["temperature"] < 1 else torch.full_like(z, 1 / 3)
        yield _law_is(f, case, want, "T = .01 is greedy, T = 1,000 uniform", loose=1e6)

    statement = "a low temperature is greedy, a high one uniform"
    return Law("temperature_limits", "limit", statement, "oracles S5", check, ("temperature",), cases=cases)


def golden(name: str, options: dict[str, float], law: tuple[float, ...], source: str) -> Law:
    """The law (.5, .3, .15, .05) under these options."""
    given = {"temperature": 1.0, **options}
    shown = ", ".join(f"{key} = {value:g}" for key, value in options.items())
    statement = f"(.5, .3, .15, .05) with {shown} is ({', '.join(f'{p:g}' for p in law)})"
    case: Case = {"logits": table(logs(0.5, 0.3, 0.15, 0.05)), **given}

    def check(f: Probed, given: Case) -> Iterator[Claim]:
        yield _law_is(f, given, table(law), statement, loose=1e3)

    return Law(name, "value", statement, source, check, tuple(options), cases=lambda: [case])


def nested() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        nuclei = [law_of(f, _bare(case, top_p=p)) > 0 for p in (0.3, 0.55, 0.83)]
        for less, more in zip(nuclei, nuclei[1:], strict=False):
            why = "a larger mass excludes no token more"
            yield Claim(_bare(case, top_p=0.55), more | ~less, "holds", None, why)

    statement = "a larger top-p keeps all that a smaller one keeps"
    return Law("nested_nuclei", "symmetry", statement, HOLTZMAN, check, ("top_p",))


def excluded() -> Law:
    z = table([-math.inf, 0.5, 1.0, 0.0], [2.0, -math.inf, -math.inf, 1.0])

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        want = torch.softmax(case["logits"] / case["temperature"], dim=-1)
        yield _law_is(f, case, want, "tokens with logit -inf stay impossible, the others share the rest")

    cases: list[Case] = [{"logits": z, "temperature": 1.0}]
    statement = "a logit of -inf stays impossible"
    return Law("excluded_tokens", "numeric", statement, "bugs P21", check, (), MINUS_INFINITY, lambda: cases)


def extreme() -> Law:
    z = table([1e4, -1e4, 9999.0], [-1e4, -1e4 - 1, -1e4 - 3])

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        yield _law_is(f, case, torch.softmax(case["logits"], dim=-1), "at logits of ±10,000 the law is right")

    cases: list[Case] = [{"logits": z, "temperature": 1.0}]
    statement = "at logits of ±10,000 the law is finite and right"
    return Law("extreme_logits", "numeric", statement, "bugs P21", check, cases=lambda: cases)


def ties() -> tuple[Law, Law]:
    z = table([1.0, 2.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0, 1.0])
    cases: list[Case] = [{"logits": z, "temperature": 1.0, "top_k": 2}]

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        law = law_of(f, case)
        left = law > 0
        enough = (left.sum(-1) >= 2) & ((law.sum(-1) - 1).abs() < 1e-5) & left[:, 1:2].any(-1)
        equal = (torch.where(left[1], law[1], law[1].max()) - law[1].max()).abs().max() < 1e-6
        why = f"with k = 2 two or more of the likeliest are kept, equals with equal chances: {law.tolist()}"
        yield Claim(case, enough.all() & equal & ~left[0, 4], "holds", None, why)

    def lowest(f: Probed, case: Case) -> Iterator[Claim]:
        want = torch.tensor([[True, True, False, False, False], [True, True, False, False, False]])
        yield _possible_are(f, case, want, "of equal logits the lowest ids are kept")

    at_least = "of equal logits at least as many are kept as are asked for"
    by_id = "of equal logits those with the lowest ids are kept"
    return (
        Law("equal_logits", "limit", at_least, "oracles S5", check, ("top_k",), cases=lambda: cases),
        Law(
            "ties", "limit", by_id, "oracles S5: ties deterministic", lowest, ("top_k",), TIES, lambda: cases
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
        why = "∂log p(v)/∂zᵤ = (1[u = v] - p(u))/T, each output with a weight of its own"
        right = (f.grad(bare, "logits", weight) - want).abs() < 1e-5
        yield Claim(bare, right, "holds", None, why, wrt="logits")

    statement = "∂log p(v)/∂zᵤ = (1[u = v] - p(u))/T"
    return Law("gradient_of_logits", "gradient", statement, "oracles SL4", check, proves=DIFFERENTIABLE)
