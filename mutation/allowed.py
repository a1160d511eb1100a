"""The survivors that are let through: by class, each with the reason why it is equivalent or harmless.

A class is a predicate on the mutant: its operator, its function and how its line changes. One that lets
nothing through is stale and fails the gate as a survivor does. Before a class is added: can a test refuse
the mutant, or can the code be written without the choice that the mutant makes otherwise?
"""

from collections.abc import Callable
from typing import NamedTuple

from mutation.mutants import Mutant


class Allowed(NamedTuple):
    """The name of a class, why no test can or need refuse its mutants, and which mutants are in it."""

    name: str
    reason: str
    covers: Callable[[Mutant], bool]


def turns(operators: str, *places: tuple[str, str, str]) -> Callable[[Mutant], bool]:
    """Mutants by one of the operators (separated by commas) that turn one text of a function into another.

    places: (function, what its line has more often before the mutation, what it has more often after it).
    """

    def covers(mutant: Mutant) -> bool:
        return mutant.operator in operators.split(", ") and any(
            mutant.function == function
            and mutant.before.count(old) > mutant.after.count(old)
            and mutant.before.count(new) < mutant.after.count(new)
            for function, old, new in places
        )

    return covers


def _promoted(mutant: Mutant) -> bool:
    """One of several widened operands of a difference is left as it came."""
    narrower = mutant.after.count("widen(") == mutant.before.count("widen(") - 1
    return mutant.operator == "function" and narrower and " - widen(" in mutant.before


def _path_of_mps(mutant: Mutant) -> bool:
    return mutant.before.startswith(('if device.type == "mps":', "law_logp = law_logp.cpu()"))


def _symmetric_margin(mutant: Mutant) -> bool:
    """The middle two of the four log-probs are exchanged where they are given, or where they are taken."""
    given = "_log_ratio_margin(chosen_logp, ref_chosen_logp, rejected_logp, ref_rejected_logp)"
    taken = "(chosen, ref_chosen, rejected, ref_rejected) = _check_pairs("
    return given in mutant.after or taken in mutant.after


BELOW_AUTOGRAD = frozenset(
    {
        "forward_pass", "forward_pass.scattered", "backward_pass", "_selected", "_pieces", "_absorb",
        "_absorb_plain", "_to_gradient", "_to_gradient_plain",
    }
)  # fmt: skip
"""The functions of `kernels.passes` that only its two passes call."""

_widened_by_addcmul = turns(
    "function", ("backward_pass", "[chosen_ids].to(rows.dtype), by_logp", "[chosen_ids], by_logp")
)

_dtype_of_mps = turns(
    "branch, precision, function",
    ("top_p", 'torch.float32 if x.device.type == "mps" else ', ".to(torch.float64)"),
    ("top_p", "torch.float32 if", "torch.float64 if"),
    ("inverse_cdf", ".to(law_logp.device, torch.float64)", "uniform[:, None]"),
)

ALLOWED: tuple[Allowed, ...] = (
    Allowed(
        "shortcut at temperature 1",
        "Where it is not taken, the same law is reached by a division by 1.",
        turns(
            "branch, constant",
            ("tempered", "if temperature == 1:", "if False:"),
            ("tempered", "temperature == 1:", "temperature == 0:"),
            ("forward_pass", "if temperature != 1 else", "rows / temperature,"),
            ("forward_pass", "temperature != 1", "temperature != 0"),
            ("backward_pass", "if temperature != 1 else", "rows / temperature,"),
            ("backward_pass", "temperature != 1", "temperature != 0"),
        ),
    ),
    Allowed(
        "detached bool",
        "A bool has no gradient to lose.",
        turns(
            "detach",
            ("token_report", "is_argmax)", "is_argmax.detach()"),
            ("_fused", "best.view", "best.detach()"),
        ),
    ),
    Allowed(
        "placeholder of a double where",
        "The number stands where the outer selection or a factor 0 drops it: any that leaves no NaN will do.",
        turns(
            "constant, sign",
            ("exact_kl", "logp, 0.0)", "logp, 1.0)"),
            ("entropy", "logp, 0.0)", "logp, 1.0)"),
            ("explained_variance", "variance, 1.0)", "variance, 2.0)"),
            ("group_normalised_advantage", "variance, 1.0)", "variance, 2.0)"),
            ("group_normalised_advantage", "variance, 1.0)", "variance, 0.0)"),
            ("group_normalised_advantage", "spread, 1.0)", "spread, 2.0)"),
            ("clipped_surrogate_loss", "0.0, log_rho", "1.0, log_rho"),
            ("best_of_n_law", "above, 0.0)", "above, 1.0)"),
            ("_log_sum", "terms, 0.0)", "terms, 1.0)"),
            ("log_prob_plain", "states, 0.0)", "states, 1.0)"),
            ("_log_share_of_draws", "rare, -1.0", "rare, 1.0"),
            ("_log_share_of_draws", "rare, -1.0", "rare, -2.0"),
            ("_log_share_of_draws", "rare, -1.0", "rare, -0.0"),
        ),
    ),
    Allowed(
        "promotion widens",
        "Type promotion widens one operand by the other, without rounding: the same number and gradient.",
        lambda mutant: _promoted(mutant) or _widened_by_addcmul(mutant),
    ),
    Allowed(
        "promotion is symmetric",
        "Which of two types widens the other does not depend on their order.",
        turns(
            "swapped operands",
            *(
                (place, "wide_type(states, unembedding)", "wide_type(unembedding, states)")
                for place in ("forward_pass", "backward_pass", "log_prob_plain", "fits")
            ),
        ),
    ),
    Allowed(
        "detached below autograd",
        "The passes run inside an operator, which autograd does not look into: nothing there has a gradient.",
        lambda mutant: mutant.operator == "detach" and mutant.function in BELOW_AUTOGRAD,
    ),
    Allowed(
        "memory that is not yet written",
        "What stands in new memory is overwritten before it is read, and any place in it will do.",
        turns(
            "sign, index",
            ("forward_pass", "kept = rows.new_empty", "kept = (-rows.new_empty"),
            ("backward_pass", "= states.new_empty(0)", "= (-states.new_empty(0))"),
            ("_pieces", "room = rows.new_empty", "room = (-rows.new_empty"),
            ("_pieces", "= room[", "= (-room["),
            ("_pieces", "room[: count * wide]", "room[-(count * wide):]"),
        ),
    ),
    Allowed(
        "a copy that is spared",
        "All positions in order are the positions themselves: the index would copy them, and change nothing.",
        turns("branch", ("_selected", "states if len(index) == len(states) else", "(states[index])")),
    ),
    Allowed(
        "another device or an older torch",
        "Only MPS has no fp64, and only an older torch cannot search an fp32 uniform among fp64 sums.",
        lambda mutant: _path_of_mps(mutant) or _dtype_of_mps(mutant),
    ),
    Allowed(
        "the only element of an axis",
        "The axis has length one, so that its first element is its last.",
        turns(
            "constant",
            ("_of_token", "[..., 0]", "[..., (-1)]"),
            ("gspo_loss", "[..., 0]", "[..., (-1)]"),
            ("_selected", "[:, 0]", "[:, (-1)]"),
            ("forward_pass", "[:, None])[:, 0]", "[:, None])[:, (-1)]"),
            ("log_prob_plain", "[:, None])[:, 0]", "[:, None])[:, (-1)]"),
            ("inverse_cdf", "[:, 0]", "[:, (-1)]"),
        ),
    ),
    Allowed(
        "a tie of measure zero",
        "The comparison turns out otherwise for one rounded number only, on which nothing is promised.",
        turns(
            "comparison",
            ("inverse_cdf", "< BOUNDARY", "<= BOUNDARY"),
            ("check_law", "excess < ", "excess <= "),
        ),
    ),
    Allowed(
        "the seam of two forms that agree there",
        "Both forms give the same number to the last digits on either side of the threshold.",
        turns(
            "comparison, constant",
            ("best_of_n_law", "above < ", "above <= "),
            ("_log_share_of_draws", "< -40", "<= -40"),
            ("_log_share_of_draws", "< -40", "< -41"),
            ("_log_share_of_draws", "< -40", "< -39"),
        ),
    ),
    Allowed(
        "an advantage of zero",
        "By which bound an advantage of 0 is multiplied does not matter.",
        turns(
            "comparison",
            ("clipped_surrogate_loss", "torch.where(adv > 0", "torch.where(adv >= 0"),
            ("clipped_surrogate_loss", "runaway = (adv < 0)", "runaway = (adv <= 0)"),
        ),
    ),
    Allowed(
        "masked twice",
        "What is let through here meets an advantage of 0, or is masked by the reduction around it.",
        turns(
            "mask",
            ("clipped_surrogate_loss", "select(advantage, mask)", "select(advantage, mask | True)"),
            (
                "clipped_surrogate_loss",
                "log_ratio(logp, old_logp, mask)",
                "log_ratio(logp, old_logp, mask | True)",
            ),
            ("gspo_loss", "log_ratio(logp, old_logp, mask)", "log_ratio(logp, old_logp, mask | True)"),
        ),
    ),
    Allowed(
        "a symmetric margin",
        "In (a - b) - (c - d) the terms b and c are alike: their exchange changes the rounding only.",
        _symmetric_margin,
    ),
    Allowed(
        "centred twice",
        "Centring is a projection: without the gradient of one of two, the other still centres the gradient.",
        turns(
            "detach",
            ("group_centred_advantage", "sequence_mean(reward,", "sequence_mean(reward.detach(),"),
            ("group_centred_advantage", "sequence_mean(deviation,", "sequence_mean(deviation.detach(),"),
        ),
    ),
    Allowed(
        "the shift of a softmax",
        "A softmax does not depend on what is subtracted from all its logits: no gradient flows through it.",
        turns("detach", ("tempered", "z.amax(", "z.detach().amax(")),
    ),
    Allowed(
        "any size of blocks",
        "How many tokens are summed at a time changes no draw.",
        turns("constant", ("<module>", "= 256", "= 257"), ("<module>", "= 256", "= 255")),
    ),
)


def allowance(mutant: Mutant, classes: tuple[Allowed, ...] = ALLOWED) -> Allowed | None:
    """The first class that a mutant is in."""
    return next((each for each in classes if each.covers(mutant)), None)
