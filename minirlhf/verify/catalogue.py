"""Every kind and every known bug, in the order in which they are listed."""

from minirlhf.verify.bugs import advantages as advantages_bugs
from minirlhf.verify.bugs import aggregation as aggregation_bugs
from minirlhf.verify.bugs import best_of_n as best_of_n_bugs
from minirlhf.verify.bugs import divergence as divergence_bugs
from minirlhf.verify.bugs import entropy as entropy_bugs
from minirlhf.verify.bugs import groups as groups_bugs
from minirlhf.verify.bugs import identity_preference as identity_preference_bugs
from minirlhf.verify.bugs import importance as importance_bugs
from minirlhf.verify.bugs import kl_usage as kl_usage_bugs
from minirlhf.verify.bugs import log_probs as log_probs_bugs
from minirlhf.verify.bugs import noisy_labels as noisy_labels_bugs
from minirlhf.verify.bugs import normalisation as normalisation_bugs
from minirlhf.verify.bugs import policy as policy_bugs
from minirlhf.verify.bugs import policy_variants as policy_variants_bugs
from minirlhf.verify.bugs import preference as preference_bugs
from minirlhf.verify.bugs import ranking as ranking_bugs
from minirlhf.verify.bugs import reference_free as reference_free_bugs
from minirlhf.verify.bugs import sampling as sampling_bugs
from minirlhf.verify.bugs import shaped_reward as shaped_reward_bugs
from minirlhf.verify.bugs import unpaired as unpaired_bugs
from minirlhf.verify.bugs import value as value_bugs
from minirlhf.verify.families import (
    adaptive_kl,
    advantages,
    aggregation,
    best_of_n,
    best_of_n_worth,
    bradley_terry,
    cispo,
    divergence,
    entropy,
    exact_kl,
    group_normalised,
    groups,
    gspo,
    identity_preference,
    importance,
    kl_reward,
    kl_usage,
    log_probs,
    noisy_labels,
    normalisation,
    orpo,
    policy,
    preference,
    ranking,
    reference_point,
    returns,
    sampled_entropy,
    sampling,
    shaped_reward,
    simpo,
    unpaired,
    value,
)
from minirlhf.verify.kinds import Kind, Law
from minirlhf.verify.laws import DESCENDING
from minirlhf.verify.subject import SubjectError
from minirlhf.verify.zoo import Bug

_FAMILIES = [
    preference,
    noisy_labels,
    identity_preference,
    simpo,
    orpo,
    unpaired,
    reference_point,
    bradley_terry,
    ranking,
    advantages,
    returns,
    normalisation,
    groups,
    group_normalised,
    shaped_reward,
    adaptive_kl,
    log_probs,
    aggregation,
    policy,
    gspo,
    cispo,
    importance,
    value,
    divergence,
    exact_kl,
    kl_usage,
    kl_reward,
    entropy,
    sampled_entropy,
    sampling,
    best_of_n,
    best_of_n_worth,
]
_ZOO = [
    preference_bugs,
    noisy_labels_bugs,
    identity_preference_bugs,
    reference_free_bugs,
    unpaired_bugs,
    ranking_bugs,
    advantages_bugs,
    normalisation_bugs,
    groups_bugs,
    shaped_reward_bugs,
    log_probs_bugs,
    aggregation_bugs,
    policy_bugs,
    policy_variants_bugs,
    importance_bugs,
    value_bugs,
    divergence_bugs,
    kl_usage_bugs,
    entropy_bugs,
    sampling_bugs,
    best_of_n_bugs,
]
KINDS: dict[str, Kind] = {kind.name: kind for family in _FAMILIES for kind in family.KINDS}
BUGS: tuple[Bug, ...] = tuple(bug for page in _ZOO for bug in page.BUGS)


def bugs_of(kind: str) -> tuple[Bug, ...]:
    """The known bugs of a kind."""
    return tuple(bug for bug in BUGS if bug.kind == kind)


def laws_of(kind: Kind) -> tuple[Law, ...]:
    """All laws of a kind, the one that only signed kinds have included."""
    return (*kind.laws, DESCENDING) if kind.signed else kind.laws


def kind_named(name: str) -> Kind:
    """The kind of that name.

    Raises:
        SubjectError: there is none; the nearest names are given.
    """
    if name not in KINDS:
        raise SubjectError(f"no kind {name!r}; expected one of {', '.join(KINDS)}")
    return KINDS[name]
