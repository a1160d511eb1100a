"""Our own objectives: the control. They are certified like everybody's."""

from torch import Tensor

from minirlhf.objectives.divergence import KLController, adapt_kl
from peers.frame import Page, Subject


def adapted_kl(coefficient: Tensor, kl: Tensor, target: float, horizon: float, n_steps: float) -> Tensor:
    """`adapt_kl` of a state that is the coefficient."""
    return adapt_kl(
        KLController(coefficient), kl, target=target, horizon=horizon, n_steps=n_steps
    ).coefficient


_PAGES = {
    "advantages": {"gae": "gae", "discounted_return": "discounted_return", "whiten": "whiten",
                   "whiten_scale_only": "whiten_scale_only"},
    "best_of_n": {"best_of_n_law": "best_of_n_law", "expected_maximum": "expected_maximum"},
    "divergence": {"kl_k1": "kl_estimator", "kl_k2": "kl_estimator", "kl_k3": "kl_estimator",
                   "exact_kl": "exact_kl", "entropy": "entropy", "kl_shaped_reward": "kl_shaped_reward",
                   "adapt_kl": "adaptive_kl"},
    "group_advantages": {"rloo_advantage": "rloo", "group_centred_advantage": "group_centred",
                         "group_normalised_advantage": "group_normalised"},
    "importance": {"truncated_importance_weight": "truncated_importance_weight",
                   "masked_importance_weight": "masked_importance_weight"},
    "kl_usage": {"k1_reward": "kl_reward", "k2_loss": "kl_loss", "k3_loss": "kl_loss",
                 "k3_ratio_loss": "kl_loss", "entropy_loss": "entropy_loss"},
    "masked": {"token_mean": "token_mean", "sequence_mean": "sequence_mean", "sequence_sum": "sequence_sum"},
    "policy": {"clipped_surrogate_loss": "clipped_surrogate"},
    "policy_variants": {"gspo_loss": "gspo", "cispo_loss": "cispo"},
    "preference": {"dpo_loss": "dpo", "conservative_dpo_loss": "conservative_dpo",
                   "robust_dpo_loss": "robust_dpo", "hinge_loss": "hinge", "ipo_loss": "ipo",
                   "ipo_summed_loss": "ipo_summed"},
    "ranking": {"bradley_terry_loss": "bradley_terry", "plackett_luce_loss": "plackett_luce"},
    "reference_free": {"simpo_loss": "simpo", "orpo_loss": "orpo"},
    "sampling": {"sampling_law": "sampling_law"},
    "unpaired": {"kto_loss": "kto", "kto_reference_point": "kto_reference_point"},
    "value": {"value_loss": "value_loss", "clipped_value_loss": "clipped_value_loss"},
}  # fmt: skip

_CALLS = {"adapt_kl": adapted_kl}

SUBJECTS = tuple(
    Subject("minirlhf", function, kind, Page(f"minirlhf.objectives.{page}"), _CALLS.get(function))
    for page, functions in _PAGES.items()
    for function, kind in functions.items()
)
