"""A tiny world for evaluation tests: ten words, a random GPT-2, and answers written down by hand."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from minirlhf.evaluation.compare import Answers, Comparison, EvaluationConfig, row
from minirlhf.models import gpt2
from minirlhf.models.interface import LanguageModel, Params

WORDS = "<end> red lamp chair is sent thank you [bold] wait".split()


class Words:
    """A tokenizer whose ids are places in WORDS."""

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(WORDS[i] for i in ids)


def model() -> LanguageModel:
    config = gpt2.GPT2Config(
        vocab_size=len(WORDS),
        n_positions=24,
        n_embd=16,
        n_layer=1,
        n_head=2,
        eos_token_id=0,
        initializer_range=0.3,
    )
    return gpt2.bind(config)


def policy(seed: int) -> Params:
    return model().init(torch.Generator().manual_seed(seed))


def gold_components(
    prompts: Sequence[str], texts: Sequence[str], facts: Sequence[Mapping[str, Any] | None]
) -> dict[str, Tensor]:
    """facts: names the item. manners: says thank you."""
    known = [fact or {} for fact in facts]
    return {
        "facts": torch.tensor([float(k["item"] in t.split()) for k, t in zip(known, texts, strict=True)]),
        "manners": torch.tensor([float("thank" in t.split()) for t in texts]),
    }


def gold_score(
    prompts: Sequence[str], texts: Sequence[str], facts: Sequence[Mapping[str, Any] | None]
) -> Tensor:
    parts = gold_components(prompts, texts, facts)
    return 2 * parts["facts"] + parts["manners"]


def answers(texts: list[list[str]], *, proxy: list[list[float]], kl: float, ended: bool = True) -> Answers:
    """Answers written by hand; the judge counts words, with the components "thanks" and "rest"."""
    shape = (len(texts), len(texts[0]))
    thanks = torch.tensor([[float(t.split().count("thank")) for t in of_prompt] for of_prompt in texts])
    words = torch.tensor([[float(len(t.split())) for t in of_prompt] for of_prompt in texts])
    return Answers(
        texts=texts,
        ids=[[[0] * len(t.split()) for t in of_prompt] for of_prompt in texts],
        ended=torch.full(shape, ended),
        proxy=torch.tensor(proxy),
        judged=words,
        components={"thanks": thanks, "rest": words - thanks},
        kl=kl + 0.1 * torch.arange(shape[0])[:, None].expand(shape),
    )


def comparison() -> Comparison:
    """Three prompts, two answers each, three policies; one writes what a terminal must not obey."""
    opponent = answers(
        [["is sent", "lamp"], ["red", "red"], ["you", "a b"]], proxy=[[0.0, 0.2], [-1, 1], [0.5, 0]], kl=0
    )
    given = {
        "sft": answers(
            [["is", "lamp is"], ["red", "a b"], ["you", "a"]], proxy=[[0.1, 0], [-0.5, 0.5], [0, 0.3]], kl=0
        ),
        "ppo": answers(
            [["thank you so very much", "thank you"], ["thank you then", "a b c"], ["a | b c", "[bold] a b"]],
            proxy=[[2.0, 2.5], [1.5, 2.0], [1.8, 2.2]],
            kl=3,
        ),
        "dpo": answers(
            [["a \x1b[2J", "d"], ["a\nb", "c"], ["<b> *a*", "a b"]],
            proxy=[[0.5, 0.6], [0.4, 1.0], [0.7, 0.3]],
            kl=1,
            ended=False,
        ),
    }
    rows = [row(name, one, opponent) for name, one in given.items()]
    prompts = ["where is the [red] lamp", "a | b", "is it sent"]
    return Comparison(rows, "word counter", prompts, given, opponent, EvaluationConfig(prompts=3, samples=2))
