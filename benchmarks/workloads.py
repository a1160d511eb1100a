"""What is asked of every system: the same weights, prompts and numbers of new tokens."""

from typing import NamedTuple

import torch
from torch.utils._pytree import tree_leaves

from minirlhf.models import gpt2
from minirlhf.models.interface import LanguageModel, Params


class Workload(NamedTuple):
    """prompts: ids. new: tokens to generate for each. batch: rows that are live at a time."""

    prompts: list[list[int]]
    new: list[int]
    batch: int

    @property
    def tokens(self) -> int:
        """Generated ones."""
        return sum(self.new)


def equal(config: gpt2.GPT2Config, batch: int) -> Workload:
    """64 new tokens after 64, one batch."""
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randint(1000, config.vocab_size - 1, (batch, 64), generator=draw).tolist()
    return Workload(prompts, [64] * batch, batch)


def skewed(config: gpt2.GPT2Config, batch: int) -> Workload:
    """256 prompts of 8 to 128 tokens, responses geometric with mean 48, at most 256."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(8, 129, (256,), generator=draw).tolist()
    prompts = [torch.randint(1000, config.vocab_size - 1, (n,), generator=draw).tolist() for n in lengths]
    new = torch.empty(256).geometric_(1 / 48, generator=draw).clamp(max=256).long().tolist()
    return Workload(prompts, new, batch)


WORKLOADS = {"equal": equal, "skewed": skewed}


def gpt2_124m() -> gpt2.GPT2Config:
    """The sizes of GPT-2 small; its weights are random here, which costs the same."""
    return gpt2.GPT2Config(vocab_size=50257, n_positions=1024, n_embd=768, n_layer=12, n_head=12)


def beginning(workload: Workload) -> Workload:
    """A small part of a workload, to warm up with."""
    count = 2 * workload.batch
    return workload._replace(prompts=workload.prompts[:count], new=[min(n, 16) for n in workload.new[:count]])


def flops(model: LanguageModel, params: Params, workload: Workload) -> float:
    """Of products with weights: prompts through the blocks, new tokens' states through the head as well."""
    head = 2.0 * model.unembedding(params).numel()
    blocks = 2.0 * sum(leaf.numel() for leaf in tree_leaves(params["h"]) if leaf.ndim == 2)
    read = sum(len(each) for each in workload.prompts) + workload.tokens - len(workload.prompts)
    return blocks * read + head * workload.tokens


def weight_bytes(model: LanguageModel, params: Params) -> int:
    """Of the matrices that a decode step multiplies by."""
    matrices = [leaf for leaf in tree_leaves(params["h"]) if leaf.ndim == 2]
    return sum(leaf.nbytes for leaf in (*matrices, model.unembedding(params)))
