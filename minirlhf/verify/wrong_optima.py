"""Where known wrong objectives end in an enumerable world, exactly: what a failed trainer is compared with.

Each is the fixed point of a mistake that was made somewhere: a KL with another weight, direction or sign, a
score paid elsewhere, a forgotten reference. tests/verify/test_goals.py shows each at rest under its mistake.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from minirlhf.verify.optima import (
    forward_kl_optimum,
    optimal_law,
    per_token_tilted,
    point_mass,
    soft_bellman,
    tilted,
)
from minirlhf.verify.preferences import (
    averaged_dpo_optimum,
    bradley_terry_fit,
    dpo_optimum,
    ipo_summed_optimum,
)
from minirlhf.verify.world import World, response_logp, truncated


class WrongOptimum(NamedTuple):
    """Where a known wrong objective ends.

    name: of the mistake; mistake: in words.
    law: the law of a policy -> the law that the wrong objective ends in, log-probs [X, N]; of several, the
        one nearest to the policy.
    """

    name: str
    mistake: str
    law: Callable[[Tensor], Tensor]


def wrong_end(name: str, mistake: str, law: Tensor) -> WrongOptimum:
    """An end that is one law, log-probs [X, N]."""
    return WrongOptimum(name, mistake, lambda _: law)


def _unmoved(ref: Tensor) -> WrongOptimum:
    return wrong_end("unmoved", "the policy is still the reference: it learns nothing", ref)


def wrong_rewards(w: World, beta: float) -> tuple[WrongOptimum, ...]:
    """Where wrong trainers of E r - β KL(π‖π_ref) end."""
    return (*_wrong_divergences(w, beta), *_wrong_payments(w, beta))


def _wrong_divergences(w: World, beta: float) -> tuple[WrongOptimum, ...]:
    """Of the two terms one is missing, or has the wrong sign, weight or direction."""
    ref = response_logp(w.ref_logits, w)
    better = w.gold > (ref.exp() * w.gold).sum(1, keepdim=True)
    return (
        _unmoved(ref),
        WrongOptimum(
            "no_kl",
            "nothing holds the policy to the reference, so that it collapses onto one good response: the KL "
            "term is missing or has the wrong sign, or k2, k3 or |k1| is paid as a reward",
            # Without a KL each of the better responses alone is a local optimum, and no prompt minds another.
            lambda law: point_mass(torch.where(better, law, -torch.inf)),
        ),
        WrongOptimum(
            "objective_sign",
            "the policy collapses onto one bad response: the advantage, or the loss, has the wrong sign, or "
            "the ratio is inverted",
            lambda law: point_mass(torch.where(better, -torch.inf, law)),
        ),
        wrong_end("reward_sign", "the reward has the wrong sign", tilted(w, -w.gold / beta)),
        wrong_end("half_beta", "β is half of what it should be", optimal_law(w, beta=beta / 2)),
        wrong_end("double_beta", "β is twice what it should be", optimal_law(w, beta=2 * beta)),
        wrong_end(
            "reference_forgotten",
            "the entropy holds the policy, not the reference",
            torch.log_softmax(w.gold / beta, dim=1),
        ),
        wrong_end("kl_averaged", "the KL is averaged over tokens", per_token_tilted(w, w.gold / beta)),
        wrong_end(
            "k3_as_loss",
            "k3 is differentiated as a loss, which is KL(π_ref‖π)",
            forward_kl_optimum(w, beta=beta),
        ),
    )


def _wrong_payments(w: World, beta: float) -> tuple[WrongOptimum, ...]:
    """The score is paid on other tokens, discounted, or not to every response."""
    ref, cut, first = response_logp(w.ref_logits, w), truncated(w), w.tokens[:, 0]
    starts = torch.nn.functional.one_hot(first, w.config.vocab_size).double()  # [N, V]
    promise = (ref.exp() * w.gold) @ starts / (ref.exp() @ starts)  # E_ref[r | first token], [X, V]
    return (
        wrong_end("reward_on_every_token", "the score is paid on every token", _paid_on_every_token(w, beta)),
        wrong_end(
            "reward_on_first_token",
            "the score is paid on the first token, so that no later one is learned",
            tilted(w, promise[:, first] / beta),
        ),
        wrong_end(
            "truncated_not_paid",
            "a truncated response gets no reward",
            tilted(w, torch.where(cut, 0.0, w.gold) / beta),
        ),
        wrong_end(
            "truncated_penalised",
            "1 is subtracted from the reward of a truncated response",
            tilted(w, (w.gold - cut.double()) / beta),
        ),
        wrong_end(
            "gamma_0.9",
            "rewards are discounted by γ = .9 per token",
            response_logp(soft_bellman(w, beta=beta, gamma=0.9).logits, w),
        ),
        wrong_end(
            "next_value_forgotten",
            "the value after a token does not count: each token is chosen for its own reward",
            response_logp(soft_bellman(w, beta=beta, gamma=0.0).logits, w),
        ),
    )


def _paid_on_every_token(w: World, beta: float) -> Tensor:
    """Where rewards to go end if each token is paid the score of the whole response: log-probs [X, N].

    What was paid before a token does not count for it, although it depends on it. So a state after t tokens
    is best for r · (|y| - t), given what the later states, which see fewer tokens to be paid, will do.
    """
    words, base = w.config.vocab_size - 1, torch.log_softmax(w.ref_logits, dim=-1)
    logits, end = torch.empty_like(base), w.config.prefixes
    value = score = w.gold[:, end:]  # after each word: what is still to be paid; the score to expect
    for depth in reversed(range(w.config.length)):
        here = slice(end - words**depth, end)
        q, r = (
            torch.cat([w.gold[:, here, None], after.unflatten(1, (-1, words))], dim=-1)
            for after in (value, score)
        )
        logits[:, here] = base[:, here] + q / beta
        score = (torch.softmax(logits[:, here], dim=-1) * r).sum(-1)
        value = beta * torch.logsumexp(logits[:, here], dim=-1) + score
        end = here.start
    return response_logp(logits, w)


def wrong_dpo(w: World, data: Tensor, beta: float) -> tuple[WrongOptimum, ...]:
    """The exact optima of wrong preference losses."""
    ref, reward = response_logp(w.ref_logits, w), bradley_terry_fit(data)
    return (
        _unmoved(ref),
        wrong_end("half_beta", "β is half of what it should be", tilted(w, 2 * reward / beta)),
        wrong_end("double_beta", "β is twice what it should be", tilted(w, reward / (2 * beta))),
        wrong_end("swapped", "chosen and rejected are swapped", tilted(w, -reward / beta)),
        wrong_end(
            "reference_forgotten",
            "the reference's log-probs are missing",
            torch.log_softmax(reward / beta, dim=1),
        ),
        wrong_end(
            "reference_sign",
            "the reference's log-probs have the wrong sign",
            torch.log_softmax(reward / beta - ref, dim=1),
        ),
        wrong_end("averaged", "log-probs are averaged over tokens", averaged_dpo_optimum(w, data, beta=beta)),
        wrong_end(
            "label_smoothing_0.1",
            "a tenth of the labels is taken for flipped",
            dpo_optimum(w, 0.9 * data + 0.1 * data.transpose(1, 2), beta=beta),
        ),
        wrong_end(
            "chosen_imitated",
            "the likelihood of the chosen responses is raised, the rejected ones are not looked at",
            data.sum(2).log(),
        ),
        wrong_end("ipo", "this is IPO on summed log-probs", ipo_summed_optimum(w, data, tau=beta)),
    )


def wrong_ipo(w: World, data: Tensor, tau: float, optimum: Callable[..., Tensor]) -> tuple[WrongOptimum, ...]:
    """The exact optima of wrong IPO losses, the right one being `optimum`."""
    ref = response_logp(w.ref_logits, w)
    return (
        _unmoved(ref),
        wrong_end("target_doubled", "the target is 1/τ, not 1/(2τ)", optimum(w, data, tau=tau / 2)),
        wrong_end("target_halved", "the target is 1/(4τ), not 1/(2τ)", optimum(w, data, tau=2 * tau)),
        wrong_end(
            "swapped",
            "chosen and rejected are swapped",
            optimum(w, data.transpose(1, 2), tau=tau),
        ),
        wrong_end("dpo", "this is DPO", dpo_optimum(w, data, beta=tau)),
    )
