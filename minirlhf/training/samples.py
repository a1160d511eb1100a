"""A few responses to the same prompts, again at every evaluation, so that one sees what the metrics mean."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from minirlhf.data.tokenizer import Tokenizer
from minirlhf.kernels.memory import release_rooms
from minirlhf.models.interface import LanguageModel, Params
from minirlhf.objectives.sampling import tempered
from minirlhf.rollout.sampler import Rollout, generate, responses

SHOWN = 3
RESPONSE = 64  # tokens


def sample_responses(
    model: LanguageModel,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    temperature: float,
    max_response: int,
    seed: int,
) -> list[str]:
    """One response to each prompt, as text; the same uniforms at every call."""
    index = torch.arange(len(prompts))
    rollout = generate(
        model,
        params,
        prompts,
        law=partial(tempered, temperature=temperature),
        max_new_tokens=max_response,
        stop_ids=model.stop_ids,
        seed=seed,
        prompt_index=index,
        sample_index=torch.zeros_like(index),
    )
    return [tokenizer.decode(ids) for ids in responses(rollout)]


def shown_prompts(
    model: LanguageModel, prompts: Sequence[Sequence[int]], *, max_response: int = RESPONSE
) -> tuple[list[list[int]], int]:
    """The first few prompts that leave room for a response, and the most tokens of theirs."""
    fitting = list(islice((list(ids) for ids in prompts if len(ids) < model.config.n_positions), SHOWN))
    return fitting, min(max_response, model.config.n_positions - max(map(len, fitting), default=0))


def sample_watcher(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    folder: Path,
    *,
    stage: str,
    seed: int,
    max_response: int = RESPONSE,
) -> Callable[[Params], dict[str, float]]:
    """An evaluation that adds no metric: it shows responses, and appends them to folder/samples.jsonl."""
    fitting, room = shown_prompts(model, prompts, max_response=max_response)
    calls = 0

    def watch(params: Params) -> dict[str, float]:
        nonlocal calls
        if fitting:
            title = f"{stage}, evaluation {calls}"
            answers = sample_responses(
                model, params, tokenizer, fitting, temperature=1.0, max_response=room, seed=seed
            )
            release_rooms()  # the steps that follow need the memory more than the next evaluation does
            _tell(title, [tokenizer.decode(ids) for ids in fitting], answers, None, folder)
        calls += 1
        return {}

    return watch


def show_rollout(title: str, tokenizer: Tokenizer, rollout: Rollout, score: Tensor, folder: Path) -> None:
    """The first few rows of a rollout with their scores, shown and appended to folder/samples.jsonl."""
    rows = range(min(SHOWN, len(rollout.tokens)))
    prompts = [tokenizer.decode(rollout.tokens[r, : int(rollout.prompt_lengths[r])].tolist()) for r in rows]
    answers = [tokenizer.decode(ids) for ids in responses(rollout)[:SHOWN]]
    _tell(title, prompts, answers, score[:SHOWN].tolist(), folder)


def _tell(
    title: str, prompts: Sequence[str], answers: Sequence[str], scores: Sequence[float] | None, folder: Path
) -> None:
    table = Table(title=title, title_justify="left", show_lines=True)
    for column in ("prompt", "response", *(("score",) if scores is not None else ())):
        table.add_column(column, overflow="fold")
    with (folder / "samples.jsonl").open("a", encoding="utf-8") as file:
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            known: dict[str, Any] = {"when": title, "prompt": prompt, "response": answer}
            cells = [Text(_short(prompt)), Text(_short(answer))]
            if scores is not None:
                known["score"] = scores[row]
                cells.append(Text(f"{scores[row]:.2f}"))
            file.write(json.dumps(known, ensure_ascii=False) + "\n")
            table.add_row(*cells)
    Console(stderr=True, width=110).print(table)


def _short(text: str, most: int = 200) -> str:
    text = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text.strip())
    return text if len(text) <= most else f"{text[:most]} …"
