"""Rewards per token: a KL penalty on every token that counts, and the score of the sequence paid once.

Two kinds: given the KL estimates, and given the log-probs, where which estimate is used is a convention. Only
k1 is a regulariser as a reward (oracles KL4); the others are reported by name, with what they do.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from minirlhf.verify.families.recurrences import INTERIOR, inserted_zeros, with_columns
from minirlhf.verify.kinds import (
    Argument,
    Case,
    Claim,
    Convention,
    Kind,
    Law,
    Mask,
    Numbers,
    Options,
    Probed,
    Reals,
)
from minirlhf.verify.laws import batch_laws, empty_row_law, formula, mask_laws, numeric_laws, relation, table

ZIEGLER = "Ziegler et al. 2019, Eq. 2 (arXiv:1909.08593); Ouyang et al. 2022, Eq. 2 (arXiv:2203.02155)"

SCORE = Argument("score", ("B",), Reals(-4.0, 4.0), "the reward of each sequence, finished or cut",
                 synonyms=("scores", "reward", "rewards", "r", "reward_score", "rm_score", "rm_scores",
                           "reward_scores",
                           "sequence_reward", "sequence_rewards", "rm_rewards",
                           "terminal_reward"))  # fmt: skip
KL = Argument("kl", ("B", "T"), Reals(-4.0, 4.0), "estimate of KL(π‖π_ref) at each token in nats",
              synonyms=("kls", "kl_div", "kl_divergence", "kl_penalty", "kl_per_token", "token_kl",
                        "per_token_kl",
                        "kld", "log_ratio", "log_ratios"))  # fmt: skip
LOGP = Argument("logp", ("B", "T"), Reals(-6.0, 0.0), "log π of each token in nats",
                synonyms=("logps", "logprobs", "log_probs", "logprob", "log_prob", "policy_logprobs",
                          "policy_logps",
                          "old_log_probs", "old_logprobs", "all_logprobs", "log_probs_policy"))  # fmt: skip
REF_LOGP = Argument("ref_logp", ("B", "T"), Reals(-6.0, 0.0), "log π_ref of the same tokens",
                    synonyms=("ref_logps", "ref_logprobs", "ref_log_probs", "ref_logprob", "ref_log_prob",
                              "reference_logprobs", "ref_policy_log_probs", "log_probs_base",
                              "reference_log_probs"))  # fmt: skip
BETA = Argument("beta", (),
                Numbers((0.1, 0.5, 0.05, 1.0), usual=(0.05, 0.1, 0.2, 0.01, 0.02, 0.001, 0.5, 1.0)),
                "β >= 0 in reward units per nat",
                synonyms=("kl_coef", "kl_coefficient", "kl_ctl", "kl_penalty_coef", "kl_weight",
                          "init_kl_coef",
                          "kl_beta", "coef", "kl_ctl_value"))  # fmt: skip
_MASK_NAMES = ("masks", "response_mask", "action_mask", "loss_mask", "completion_mask", "attention_mask",
               "eos_mask",
               "valid_mask", "token_mask")  # fmt: skip


def _mask(like: str) -> Argument:
    return Argument("mask", ("B", "T"), Mask(), "True = the token counts",
                    neutral=lambda c: torch.ones_like(c[like]).bool(), synonyms=_MASK_NAMES)  # fmt: skip


ARGUMENTS = (SCORE, KL, _mask("kl"), BETA)
LOGP_ARGUMENTS = (SCORE, LOGP, REF_LOGP, _mask("logp"), BETA)
POSITION = Convention("reward position", {
    "last": "on the last token that counts",
    "after": "one slot after it, in the last column where there is none: GAE has to count that slot",
})  # fmt: skip
ESTIMATORS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda s: s,
    "k2": lambda s: s.square() / 2,
    "k3": lambda s: torch.expm1(-s) + s,
    "abs": lambda s: s.abs(),
}
_NO_LEASH = "as a reward no regulariser: it drives the policy from its reference"
ESTIMATOR = Convention("estimator", {
    "k1": "k1, the log ratio",
    "k2": f"k2, half its square; {_NO_LEASH}",
    "k3": f"k3; {_NO_LEASH}",
    "abs": f"its absolute value; {_NO_LEASH}",
})  # fmt: skip
Penalty = Callable[[Case, Options], Tensor]


def last_token(mask: Tensor) -> Tensor:
    """[B, T] bool: the last token of each row that counts."""
    result = torch.zeros_like(mask)
    for b, row in enumerate(mask.tolist()):
        if any(row):
            result[b, max(t for t, counts in enumerate(row) if counts)] = True
    return result


def _paid(case: Case, options: Options) -> Tensor:
    """[B, T] bool: where the mask is True and the score is paid."""
    last = last_token(case["mask"])
    if options["reward position"] == "after":
        last[:, :-1] = False
    return last


def _given(case: Case, options: Options) -> Tensor:
    return case["kl"]


def _estimated(case: Case, options: Options) -> Tensor:
    return ESTIMATORS[options["estimator"]](case["logp"] - case["ref_logp"])


def _oracle(penalty: Penalty) -> Callable[[Case, Options], Tensor]:
    def oracle(case: Case, options: Options) -> Tensor:
        reward = torch.where(case["mask"], -case["beta"] * penalty(case, options), 0.0)
        return reward + torch.where(_paid(case, options), case["score"][:, None], 0.0)

    return oracle


def _score_alone(case: Case, options: Options) -> Tensor:
    return torch.where(_paid(case, options), case["score"][:, None], 0.0)


def _accounting(penalty: Penalty) -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        costs = torch.where(case["mask"], case["beta"] * penalty(case, f.options), 0.0).sum(-1)
        want = _score_alone(case, f.options).sum(-1) - costs
        why = "a row sums to its score less β times its KL"
        yield Claim(case, f.value(case).sum(-1), "==", want, why, take=".sum(-1)")

    return Law("accounting", "identity",
               "each row sums to its score less β times its KL: paid once, charged once",
               "oracles KL11; bugs P13, E01", check)  # fmt: skip


def _impulses(penalty: Penalty, charged: str) -> tuple[Law, ...]:
    """The answers to one more score and to one more nat at one token."""

    def score(f: Probed, case: Case) -> Iterator[Claim]:
        changed = {**case, "score": case["score"] + 1}
        want = f.value(case) + _paid(case, f.options)
        yield Claim(changed, f.value(changed), "==", want, "one more score arrives once, where it is paid")

    def nat(f: Probed, case: Case) -> Iterator[Claim]:
        for k in range(case["mask"].shape[1]):
            x = case[charged].clone()
            x[:, k] += 1
            changed = {**case, charged: x}
            more = penalty(changed, f.options) - penalty(case, f.options)
            want = f.value(case) - torch.where(case["mask"], case["beta"] * more, 0.0)
            yield Claim(
                changed, f.value(changed), "==", want, f"one more nat at token {k} costs β there alone"
            )

    return (
        Law("score_impulse", "gradient", "∂r_t/∂score is 1 at the token that is paid, and 0 elsewhere",
            "oracles GAE14; TRL #1893, #3750, #5338", score),
        Law("kl_impulse", "gradient", "a token is charged for its own KL alone, with a minus sign",
            "bugs E09: the signs flipped; oracles KL11", nat),
    )  # fmt: skip


def _slot_after() -> Law:
    """Where the score is paid beside the tokens, it must be there."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        if f.options["reward position"] != "after":
            return
        free = {**case, **{n: case[n] * case["mask"] for n in ("kl", "logp", "ref_logp") if n in case}}
        slot = last_token(case["mask"]).roll(1, dims=-1)
        slot[:, 0] = False
        outside = f.raw(free).masked_fill(case["mask"], 0.0)
        want = torch.where(slot, case["score"][:, None], 0.0)
        yield Claim(free, outside, "==", want, "the score of a row that ended is in the slot after it",
                    take=f".masked_fill(tensor({case['mask'].tolist()}), 0.0)", raw=True)  # fmt: skip

    return Law("score_is_somewhere", "identity",
               "a score that is not on a token is in the slot after the last one",
               "bugs E01, P13: lost or paid twice", check, ("mask",))  # fmt: skip


def _on_tokens(law: Law) -> Law:
    """The law, for subjects that pay on a token: the slot after it is masked, and padding moves it."""
    return law._replace(
        check=lambda f, case: law.check(f, case) if f.options["reward position"] == "last" else iter(())
    )


def _columns(tensors: tuple[str, ...]) -> tuple[Law, ...]:
    def prompted(f: Probed, case: Case) -> Iterator[Claim]:
        changed, want = with_columns(case, tensors, 0, 2), inserted_zeros(f.value(case), 0, 2)
        yield Claim(
            changed, f.value(changed), "==", want, "two columns of prompt before the row change nothing"
        )

    def stepped_over(f: Probed, case: Case) -> Iterator[Claim]:
        half = case["mask"].shape[1] // 2
        changed, want = with_columns(case, tensors, half, 1), inserted_zeros(f.value(case), half, 1)
        why = f"column {half} does not count: it is charged nothing, and the last token is still the last"
        yield Claim(changed, f.value(changed), "==", want, why)

    return (
        Law("prompt_length", "mask", "columns that do not count before a row change nothing", "bugs A13",
            prompted,
            ("mask",)),
        Law("interior_mask", "mask", "a token between two others that does not count is stepped over",
            "oracles GAE13; verl #2337", stepped_over, ("mask",), proves=INTERIOR),
    )  # fmt: skip


def _shared_laws(arguments: tuple[Argument, ...], penalty: Penalty, tensors: tuple[str, ...],
                 reference: Callable[[Case], Case]) -> tuple[Law, ...]:  # fmt: skip
    """reference: the case with the policy at its reference."""
    return (
        _accounting(penalty),
        *_impulses(penalty, tensors[0]),
        relation("beta_zero", "limit", "β = 0: only the score", "oracles KL11", lambda c: {**c, "beta": 0.0},
                 lambda v, c, f: _score_alone(c, f.options), needs=("beta",)),
        relation("at_reference", "limit", "no KL: only the score", "oracles KL11", reference,
                 lambda v, c, f: _score_alone(c, f.options)),
        relation("no_score", "limit", "without a score only the penalty is left", ZIEGLER,
                 lambda c: {**c, "score": 0 * c["score"]}, lambda v, c, f: v - _score_alone(c, f.options)),
        relation("twice_beta", "symmetry", "twice the β: twice the penalty, the same score", ZIEGLER,
                 lambda c: {**c, "beta": 2 * c["beta"]}, lambda v, c, f: 2 * v - _score_alone(c, f.options),
                 needs=("beta",)),
        _slot_after(),
        *_columns(tensors),
        *batch_laws(arguments),
        *(_on_tokens(law) if law.name in ("padding_amount", "zero_under_mask") else law
          for law in mask_laws(arguments, differentiable=())),
        empty_row_law(arguments),
        *numeric_laws(["score", *tensors]),
    )  # fmt: skip


def _golden(case: Case, penalty: Penalty) -> Law:
    def check(f: Probed, given: Case) -> Iterator[Claim]:
        costs = penalty(given, f.options)
        k1 = table([-0.02, 0.05, 2.0])
        want = k1 if f.options.get("estimator", "k1") == "k1" else -0.1 * costs + table([0.0, 0.0, 2.0])
        yield Claim(given, f.value(given), "==", want, "β = .1, s = (.2, -.5, 0), score 2: (-.02, .05, 2)")

    statement = "β = .1, log ratios (.2, -.5, 0), score 2: (-.02, .05, 2), summing to 2.03"
    return Law("golden_row", "value", statement, "oracles 5.3", check, cases=lambda: [case])


_FULL = {
    "score": torch.tensor([2.0], dtype=torch.float64),
    "mask": torch.ones(1, 3, dtype=torch.bool),
    "beta": 0.1,
}

SHAPED = Kind(
    name="kl_shaped_reward",
    title="KL-shaped rewards per token, from KL estimates",
    arguments=ARGUMENTS,
    returns="[B, T] in reward units",
    shape=("B", "T"),
    oracle=_oracle(_given),
    conventions=(POSITION,),
    mask="mask",
    laws=(
        formula("r_t = -β kl_t, and the score once per row", ZIEGLER),
        _golden({**_FULL, "kl": table([0.2, -0.5, 0.0])}, _given),
        relation("homogeneous", "symmetry", "score and KL times a factor: the reward times it", ZIEGLER,
                 lambda c: {**c, "score": -1.5 * c["score"], "kl": -1.5 * c["kl"]}, lambda v, c, f: -1.5 * v),
        relation("beta_times_kl", "symmetry", "only the product β·kl counts", ZIEGLER,
                 lambda c: {**c, "beta": 2 * c["beta"], "kl": c["kl"] / 2}, lambda v, c, f: v,
                 needs=("beta",)),
        *_shared_laws(ARGUMENTS, _given, ("kl",), lambda c: {**c, "kl": 0 * c["kl"]}),
    ),
)  # fmt: skip


def _exchanged() -> Law:
    """Policy and reference exchanged: the log ratio changes its sign."""
    sign = {"k1": -1.0, "k2": 1.0, "abs": 1.0}

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        if f.options["estimator"] in sign:
            changed = {**case, "logp": case["ref_logp"], "ref_logp": case["logp"]}
            paid = _score_alone(case, f.options)
            want = paid + sign[f.options["estimator"]] * (f.value(case) - paid)
            yield Claim(changed, f.value(changed), "==", want, "policy and reference exchanged: s becomes -s")

    return Law("exchanged", "symmetry", "policy and reference exchanged: k1 turns round, k2 and |s| stay",
               "oracles KL2", check)  # fmt: skip


def _never_paid() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        if f.options["estimator"] != "k1":
            got = f.value(case)
            yield Claim(
                case, got, "<=", _score_alone(case, f.options), "k2, k3 and |s| never pay: they are >= 0"
            )

    return Law("penalty_sign", "limit", "an estimate that is never negative never pays", "oracles KL2", check)


FROM_LOGPS = Kind(
    name="kl_shaped_reward_from_logps",
    title="KL-shaped rewards per token, from log-probs",
    arguments=LOGP_ARGUMENTS,
    returns="[B, T] in reward units",
    shape=("B", "T"),
    oracle=_oracle(_estimated),
    conventions=(POSITION, ESTIMATOR),
    mask="mask",
    laws=(
        formula("r_t = -β (log π - log π_ref), and the score once per row", ZIEGLER),
        _golden({**_FULL, "logp": table([-1.0, -2.0, -0.5]), "ref_logp": table([-1.2, -1.5, -0.5])},
                _estimated),
        relation("common_shift", "symmetry", "both log-probs shifted alike: the same", "oracles KL2",
                 lambda c: {**c, "logp": c["logp"] - 1.25, "ref_logp": c["ref_logp"] - 1.25}, lambda v, c,
                 f: v),
        _exchanged(),
        _never_paid(),
        *_shared_laws(LOGP_ARGUMENTS, _estimated, ("logp", "ref_logp"),
                      lambda c: {**c, "logp": c["ref_logp"]}),
    ),
)  # fmt: skip

KINDS = (SHAPED, FROM_LOGPS)
