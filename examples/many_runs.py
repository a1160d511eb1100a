"""Many small runs at once: DPO at every β with every seed, each a GPT-2, all in one step by `torch.vmap`.

    python examples/many_runs.py                              64 runs, half a minute on two cores
    python examples/many_runs.py --betas 0.3 1 3 --seeds 24 --steps 300

The step of one small model leaves a machine idle: it is hundreds of tiny operations. So the parameters and
Adam's moments of all runs are stacked, [betas, seeds, ...], and `vmap` turns the loss of *one* run into the
losses of all. The gradient of their sum is every run's own gradient, since runs share no parameter; AdamW is
elementwise. What trains one model (`training.update`) trains them all, and nothing in the loss knows of it.

The task has a known answer. In the enumerable world (`minirlhf.verify`) all responses are listed, 15 to each
of two prompts; the reference is a fresh GPT-2, the preferences are drawn from it and judged by Bradley-Terry
on the gold reward. There DPO's optimum is π* ∝ π_ref e^{r/β}, and no policy whatsoever lies above R*(K), the
highest expected reward at a divergence K. The picture holds every trained policy against both.
"""

import math
import statistics
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from minirlhf.kernels.logprob import token_logp_dense
from minirlhf.models import gpt2
from minirlhf.models.interface import LanguageModel, Params, aligned
from minirlhf.objectives.masked import sequence_sum
from minirlhf.objectives.preference import dpo_loss
from minirlhf.runs import InputError
from minirlhf.training.progress import progress
from minirlhf.training.update import Loss, TrainState, adamw, cosine_with_warmup, init_state, update
from minirlhf.verify.optima import frontier, optimal_law
from minirlhf.verify.world import World, response_logp, small_world, tabulate


@dataclass(frozen=True)
class Options:
    """Trains one policy for every β and every seed, all at once."""

    betas: tuple[float, ...] = (0.125, 0.25, 0.4, 0.6, 0.9, 1.4, 2.2, 4.0)
    """DPO's β, reward units per nat; each has a colour in the picture."""
    seeds: int = 8
    """Runs at each β; a seed draws the prompts, the responses and their labels."""
    steps: int = 500
    """Optimiser steps of every run."""
    pairs: int = 16
    """Pairs per step and run, fresh ones each time."""
    learning_rate: float = 1e-3
    """Peak step size of AdamW, of every run; a half cosine takes it to 0."""
    width: int = 32
    """Width of the two-layer GPT-2."""
    alone: int = 20
    """Steps that two of the runs also take one after the other, for the comparison of time and parameters."""
    out: Path = Path("runs/many_runs.png")
    """The picture."""

    def __post_init__(self) -> None:
        for name in ("seeds", "steps", "pairs", "width", "alone"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not (self.betas and all(0 < beta < float("inf") for beta in self.betas)):
            raise InputError(f"betas must be one or more positive numbers, got {self.betas}")
        if not 0 < self.learning_rate < float("inf"):
            raise InputError(f"learning_rate must be positive, got {self.learning_rate}")
        if self.alone > self.steps:
            raise InputError(f"alone must be at most steps = {self.steps}, got {self.alone}")
        if self.width % 2:
            raise InputError(f"width must be even, the model has two heads, got {self.width}")


class Task(NamedTuple):
    """The world with a GPT-2 as its reference.

    w: its `ref_logits` are the reference's. tokens, mask: int64, bool [X N, 1 + T] every response to every
    prompt, behind it. ref_logp: [X N] log π_ref of each.
    """

    w: World
    model: LanguageModel
    reference: Params
    tokens: Tensor
    mask: Tensor
    ref_logp: Tensor


class Batch(NamedTuple):
    """2b rows, the chosen responses and then the rejected ones; with a leading axis [seeds] for all runs."""

    tokens: Tensor
    mask: Tensor
    ref_logp: Tensor


class Stand(NamedTuple):
    """Where policies stand, exactly: KL(π‖π_ref) in nats, expected reward, and how far from the best.

    regret: (J* - J(π)) / (J* - J(π_ref)) of J = E r - β KL: 0 at the optimum, 1 at the reference.
    """

    divergence: Tensor
    reward: Tensor
    regret: Tensor


class Comparison(NamedTuple):
    """The stacked step beside single ones.

    together, alone: seconds of a step of all runs, of one run. difference: largest, of any parameter of the
        runs that were trained both ways, after `steps` steps. moved: largest way that one of them went.
    """

    together: float
    alone: float
    difference: float
    moved: float


def task(width: int) -> Task:
    """Prompt x is the token V + x, which the policy reads and cannot write."""
    w = small_world(prompts=2)
    words, longest, prompts = w.config.vocab_size, w.config.length, w.config.prompts
    model = gpt2.bind(
        gpt2.GPT2Config(
            words + prompts,
            n_positions=1 + longest,
            n_embd=width,
            n_layer=2,
            n_head=2,
            initializer_range=0.2,  # so that the reference prefers something
            eos_token_id=0,
        )
    )
    model = model._replace(unembedding=lambda params: gpt2.unembedding(params)[:words])
    reference = model.init(torch.Generator().manual_seed(0))
    asked = torch.arange(words, words + prompts)[:, None, None].expand(-1, len(w.responses), 1)
    tokens = torch.cat([asked, w.tokens.expand(prompts, -1, -1)], -1).flatten(0, 1)
    mask = torch.cat([torch.zeros_like(w.mask[:, :1]), w.mask], 1).repeat(prompts, 1)
    with torch.no_grad():
        ref_logp = response_logps(model, reference, tokens, mask)
    w = w._replace(ref_logits=tabulate(ref_logp.double().view_as(w.gold), w))
    return Task(w, model, reference, tokens, mask, ref_logp)


def response_logps(model: LanguageModel, params: Params, tokens: Tensor, mask: Tensor) -> Tensor:
    """log π(y|x) [B] of rows [B, 1 + T], summed over the response."""
    states = aligned(model.states(params, tokens, torch.arange(tokens.shape[1]), attend))
    return sequence_sum(token_logp_dense(states, model.unembedding(params), tokens, mask), mask)


def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, window: int | None) -> Tensor:
    """Causal attention as two products: PyTorch's fused one would run a call for each run under vmap."""
    assert scale is None and window is None, "GPT-2 asks for neither"
    later = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).triu(1)
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(later, -torch.inf)
    return scores.softmax(-1) @ v


def loss_of_one(params: Params, batch: Batch, beta: Tensor, *, model: LanguageModel) -> Tensor:
    """Mean DPO loss of one run's batch: []. Nothing here knows of other runs."""
    logp = response_logps(model, params, batch.tokens, batch.mask)
    return dpo_loss(*logp.chunk(2), *batch.ref_logp.chunk(2), beta=beta).mean()


def loss_of_all(
    params: Params, batch: Batch, runs: Tensor, *, model: LanguageModel, betas: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum of the losses of all runs, and their mean beside it.

    Args:
        params: each leaf [betas, seeds, ...].
        batch: each tensor [seeds, ...]; runs of one seed see the same pairs.
        runs: [] how many there are.
        betas: [betas].
    """
    over_seeds = torch.vmap(partial(loss_of_one, model=model), in_dims=(0, 0, None))
    losses = torch.vmap(over_seeds, in_dims=(0, None, 0))(params, batch, betas)
    return losses.sum(), {"mean": losses.mean()}


def batches(given: Task, options: Options) -> list[Batch]:
    """For every step the pairs of every seed: two draws from the reference, labelled by Bradley-Terry."""
    law, gold = given.ref_logp.view_as(given.w.gold).exp(), given.w.gold.flatten()
    prompts, responses = given.w.gold.shape
    count, drawn = options.steps * options.pairs, []
    for seed in range(options.seeds):
        generator = torch.Generator().manual_seed(seed)
        prompt = torch.randint(prompts, (count,), generator=generator)
        pair = torch.multinomial(law[prompt], 2, replacement=True, generator=generator)
        pair = (pair + responses * prompt[:, None]).T  # [2, count] of all X N
        wins = torch.rand(count, generator=generator) < torch.sigmoid(gold[pair[0]] - gold[pair[1]])
        drawn.append(torch.where(wins, pair, pair.flip(0)).view(2, options.steps, options.pairs))
    rows = torch.stack(drawn).permute(2, 0, 1, 3).flatten(2)  # [steps, seeds, 2 pairs]
    return [Batch(given.tokens[each], given.mask[each], given.ref_logp[each]) for each in rows]


def train(given: Task, options: Options, data: list[Batch], *, keep_at: int) -> tuple[Params, Params, float]:
    """All runs at once: their parameters at the end and after `keep_at` steps, and seconds per step."""
    betas = torch.tensor(options.betas)
    shape = (len(options.betas), options.seeds)
    state = init_state(tree_map(lambda leaf: leaf.expand(*shape, *leaf.shape), given.reference))
    loss = partial(loss_of_all, model=given.model, betas=betas)
    kept, seconds, tokens = state.params, [], betas.numel() * int(data[0].mask.sum())
    with progress(f"DPO, {shape[0]} betas x {shape[1]} seeds", options.steps) as advance:
        for batch in data:
            start = time.perf_counter()
            state, metrics = step(state, batch, loss, options)
            seconds.append(time.perf_counter() - start)
            if state.step == keep_at:
                kept = tree_map(torch.clone, state.params)
            advance(tokens, {"mean loss": float(metrics["mean"])} if state.step % 20 == 0 else None)
    return state.params, kept, statistics.median(seconds)


def train_one(
    given: Task, options: Options, data: list[Batch], beta: float, seed: int
) -> tuple[Params, float]:
    """One run by itself, over these batches: its parameters, and seconds per step."""

    def loss(params: Params, batch: Batch, runs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return loss_of_one(params, batch, torch.tensor(beta), model=given.model), {}

    state, seconds = init_state(given.reference), []
    for batch in data:
        start = time.perf_counter()
        state, _ = step(state, Batch(*(field[seed] for field in batch)), loss, options)
        seconds.append(time.perf_counter() - start)
    return state.params, statistics.median(seconds)


def step(
    state: TrainState, batch: Batch, loss: Loss, options: Options
) -> tuple[TrainState, dict[str, Tensor]]:
    """An update as any stage's. The norm of the gradient is that of all runs together: nothing is clipped."""
    warm_up = options.steps // 10
    return update(
        state,
        [batch],
        torch.ones(()),
        loss=loss,
        optimiser=partial(adamw, eps=1e-6),  # at 1e-8 it takes full steps on the rounding of a gradient 0
        learning_rate=cosine_with_warmup(
            state.step, total=options.steps, warmup=warm_up, peak=options.learning_rate
        ),
        max_grad_norm=float("inf"),
    )


def compare(given: Task, options: Options, data: list[Batch], kept: Params, together: float) -> Comparison:
    """Trains the first run and the last one by themselves for `alone` steps, and holds both ways together."""
    differences, ways, seconds = [], [], []
    for place in ((0, 0), (len(options.betas) - 1, options.seeds - 1)):
        own, taken = train_one(given, options, data[: options.alone], options.betas[place[0]], place[1])
        seconds.append(taken)
        leaves = zip(tree_leaves(kept), tree_leaves(own), tree_leaves(given.reference), strict=True)
        for stacked, single, start in leaves:
            differences.append(float((stacked[place] - single).abs().max()))
            ways.append(float((single - start).abs().max()))
    return Comparison(together, statistics.mean(seconds), max(differences), max(ways))


@torch.no_grad()
def stands(given: Task, params: Params, betas: tuple[float, ...]) -> Stand:
    """Of all runs, by enumeration: each [betas, seeds]."""
    of_one = partial(response_logps, given.model, tokens=given.tokens, mask=given.mask)
    law = torch.vmap(torch.vmap(of_one))(params).double().unflatten(-1, given.w.gold.shape)
    return stand(law, given.w, torch.tensor(betas, dtype=torch.float64)[:, None])


def optima(w: World, betas: tuple[float, ...]) -> Stand:
    """Of π* ∝ π_ref e^{r/β} at each β: each [betas]."""
    law = torch.stack([optimal_law(w, beta=beta) for beta in betas])
    return stand(law, w, torch.tensor(betas, dtype=torch.float64))


def stand(law: Tensor, w: World, beta: Tensor) -> Stand:
    """Of laws over responses, log-probs [..., X, N], at their β, which broadcasts to [...]."""
    ref = response_logp(w.ref_logits, w)
    divergence = (law.exp() * (law - ref)).sum(-1).mean(-1)
    reward = (law.exp() * w.gold).sum(-1).mean(-1)
    best = beta * (ref + w.gold / beta[..., None, None]).logsumexp(-1).mean(-1)
    at_reference = (ref.exp() * w.gold).sum(-1).mean(-1)
    return Stand(divergence, reward, (best - (reward - beta * divergence)) / (best - at_reference))


def report(betas: tuple[float, ...], found: Stand, best: Stand) -> Table:
    """Closed form beside mean ± standard deviation over seeds."""
    table = Table(title="DPO's policies and where they should be")
    for name in ("β", "KL* nats", "KL nats", "E r*", "E r", "regret"):
        table.add_column(name, justify="right")
    for i, beta in enumerate(betas):
        over = [f"{x[i].mean():.3f} ± {x[i].std(correction=0):.3f}" for x in found]
        table.add_row(
            f"{beta:g}", f"{best.divergence[i]:.3f}", over[0], f"{best.reward[i]:.3f}", over[1], over[2]
        )
    return table


def draw(w: World, betas: tuple[float, ...], found: Stand, best: Stand, path: Path) -> None:
    """Left, reward over divergence with the frontier; right, divergence over β with the closed form."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    colours = plt.get_cmap("viridis")(torch.linspace(0, 0.92, len(betas)).tolist())
    reach = torch.linspace(0, 1.05 * max(float(x.max()) for x in (found[0], best[0])), 200)
    left.plot(reach, frontier(reach, w), color="0.3", lw=1, label="R*(K): nothing lies above", zorder=1)
    many = torch.linspace(math.log(min(betas)), math.log(max(betas)), 60).exp().tolist()
    right.plot(many, optima(w, tuple(many)).divergence, color="0.3", lw=1, label="closed form, π*", zorder=1)
    for i, (beta, colour) in enumerate(zip(betas, colours, strict=True)):
        seeds = len(found.divergence[i])
        spread = torch.linspace(-0.04, 0.04, seeds).exp() if seeds > 1 else torch.ones(1)
        points = {"s": 16, "color": colour, "alpha": 0.7, "linewidths": 0, "zorder": 3}
        left.scatter(found.divergence[i], found.reward[i], label=f"β = {beta:g}", **points)
        right.scatter(beta * spread, found.divergence[i], **points)
        exact = {"s": 90, "facecolors": "none", "edgecolors": [colour], "linewidths": 1.3, "zorder": 2}
        left.scatter(best.divergence[i], best.reward[i], **exact)
        right.scatter(beta, best.divergence[i], **exact)
    left.scatter([], [], s=90, facecolors="none", edgecolors="0.3", label="π* at each β")
    right.scatter([], [], s=90, facecolors="none", edgecolors="0.3", label="π* at each β")
    right.scatter([], [], s=16, color="0.3", label="a run (moved sideways by its seed)")
    left.set(xlabel="KL(π‖π_ref), nats per response", ylabel="expected reward", title="Reward for divergence")
    right.set(xscale="log", yscale="log", xlabel="β, reward units per nat")
    right.set(ylabel="KL(π‖π_ref), nats per response", title="Divergence for β")
    right.set_xticks(betas, [f"{beta:g}" for beta in betas])
    right.minorticks_off()
    for panel in (left, right):
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    figure.suptitle(
        f"{len(betas)} βs × {len(found.divergence[0])} seeds of DPO in one vmapped step", fontsize=11
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(options: Options) -> None:
    """Trains, compares, prints the table and what it cost, draws."""
    console, start = Console(), time.perf_counter()
    given = task(options.width)
    data = batches(given, options)
    params, kept, together = train(given, options, data, keep_at=options.alone)
    compared = compare(given, options, data, kept, together)
    found, best = stands(given, params, options.betas), optima(given.w, options.betas)
    console.print(report(options.betas, found, best))
    runs = len(options.betas) * options.seeds
    console.print(
        f"A step of all {runs} runs takes {1e3 * compared.together:.0f} ms. A step of one by itself takes "
        f"{1e3 * compared.alone:.1f} ms, of {runs} one after the other so {1e3 * runs * compared.alone:.0f} "
        f"ms: {runs * compared.alone / compared.together:.1f} times as long.\n"
        f"Two of the runs both ways, after {options.alone} steps: no parameter differs by more than "
        f"{compared.difference:.1e}; they had moved by up to {compared.moved:.1e}.",
        highlight=False,
    )
    draw(given.w, options.betas, found, best, options.out)
    spent = time.perf_counter() - start
    console.print(f"{options.out} drawn; {spent:.0f} s, {torch.get_num_threads()} threads.", highlight=False)


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except InputError as error:
        sys.exit(f"error: {error}")
