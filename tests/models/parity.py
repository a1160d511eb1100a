"""Every family against transformers: the checks, and the table that shows them.

`python -m tests.models.parity` (or `make parity`) prints family × configuration × check with the largest
difference relative to the largest |logit|, and exits 1 if a check fails. tests/models/test_parity.py calls
the same checks. The configurations are in tests/models/cases.py.
"""

import importlib
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from minirlhf.models.checkpoint import (
    Normalisation,
    load_language_model,
    load_scalar_model,
    save_language_model,
    save_scalar_model,
)
from minirlhf.models.families import FAMILIES
from minirlhf.models.interface import LanguageModel, Params, scalar, with_scalar_head
from minirlhf.models.tensor_files import named
from tests.models.cases import CASES, Case, tiny_model
from tests.models.plain_cache import extend_, new_cache
from tests.models.tiny import ragged, valid


def transformers() -> Any:
    """The library, without its warnings, progress bars and advice.

    Raises:
        ImportError: it is not installed; `pip install 'minirlhf[test]'`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library = importlib.import_module("transformers")
    library.logging.set_verbosity_error()
    library.logging.disable_progress_bar()
    return library


def their_model(case: Case, kind: str, seed: int = 0, **options: Any) -> Any:
    """Their model of a case in evaluation mode, with every parameter drawn at random."""
    library = transformers()
    config = getattr(library, case.theirs)(**deepcopy(case.entries), **options)  # it fills in nested entries
    model = getattr(library, kind)(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


class Pair(NamedTuple):
    """Their random model of a case, and ours as loaded from the directory that they wrote.

    folder: their directory is `theirs` in it; the checks write beside it.
    """

    case: Case
    folder: Path
    reference: Any
    model: LanguageModel
    params: Params


def pair(case: Case, folder: Path) -> Pair:
    """Makes both models; `folder` exists and is empty."""
    reference = their_model(case, case.language_class)
    reference.save_pretrained(folder / "theirs")
    return Pair(case, folder, reference, *load_language_model(folder / "theirs"))


# --- the checks: a pair -> the largest difference, relative to the largest number compared ------------------


def difference(got: Tensor, right: Tensor) -> float:
    """max |got - right| / max |right|, infinite where `got` is not finite or `right` too flat to tell."""
    largest = right.abs().max()
    if got.shape != right.shape or not got.isfinite().all() or right.std() < 0.05 * largest:
        return float("inf")
    return float((got - right).abs().max() / largest)


def logits(model: LanguageModel, params: Params, tokens: Tensor) -> Tensor:
    """Uncached, [B, T, V]."""
    return model.hidden(params, tokens) @ model.unembedding(params).T


def their_logits(reference: Any, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Uncached, [B, T, V]; mask: bool, False at padding."""
    with torch.no_grad():
        return reference(tokens, attention_mask=None if mask is None else mask.long()).logits


def ragged_logits(both: Pair) -> float:
    """A right-padded batch, compared at its valid positions."""
    tokens, lengths = ragged()
    mask = valid(tokens, lengths)
    right = their_logits(both.reference, tokens, mask)
    return difference(logits(both.model, both.params, tokens)[mask], right[mask])


def cached_logits(both: Pair) -> float:
    """A ragged prefill, a chunk of 3, then single tokens, against their pass over the whole rows."""
    tokens, _ = ragged(2, longest=20)
    lengths = torch.tensor([2, 9, 11, 1, 6])
    right = their_logits(both.reference, tokens)
    cache = new_cache(both.model, both.params, *tokens.shape)
    start, worst = torch.zeros_like(lengths), 0.0
    for take in (11, 3, 1, 1, 1, 1):
        positions = start[:, None] + torch.arange(take)
        states = extend_(both.model, both.params, tokens.gather(1, positions), start, cache)
        got = states @ both.model.unembedding(both.params).T
        mask = positions < (lengths[:, None] if take == 11 else tokens.shape[1])
        expected = right.gather(1, positions[..., None].expand_as(got))
        worst = max(worst, difference(got[mask], expected[mask]))
        start = lengths if take == 11 else start + take
    return worst


def greedy(both: Pair) -> float:
    """The share of greedy tokens, with and without our cache, that differ from their `generate`."""
    model, params, new = both.model, both.params, 12
    tokens, lengths = ragged(1, longest=8)
    expected, uncached = [], []
    for row, length in zip(tokens, lengths.tolist(), strict=True):
        ids = row[None, :length]
        out = both.reference.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new,
            do_sample=False, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        expected.append(out[0, length:])
        for _ in range(new):
            ids = torch.cat([ids, logits(model, params, ids)[:, -1:].argmax(-1)], dim=1)
        uncached.append(ids[0, length:])

    cache = new_cache(model, params, len(tokens), tokens.shape[1] + new)
    states = extend_(model, params, tokens, torch.zeros_like(lengths), cache)
    last = states[torch.arange(len(tokens)), lengths - 1]
    drawn: list[Tensor] = []
    for step in range(new):
        drawn.append((last @ model.unembedding(params).T).argmax(-1))
        last = extend_(model, params, drawn[-1][:, None], lengths + step, cache)[:, 0]
    right = torch.stack(expected)
    wrong = (torch.stack(uncached) != right) | (torch.stack(drawn, dim=1) != right)
    return float(wrong.float().mean())


def half_precision(both: Pair) -> float:
    """Our logits with bf16 parameters, uncached and cached, against their fp32 ones."""
    tokens, _ = ragged(3)
    right = their_logits(both.reference, tokens)
    params = tree_map(lambda x: x.bfloat16(), both.params)
    cache = new_cache(both.model, params, *tokens.shape)
    states = extend_(both.model, params, tokens, torch.zeros(len(tokens), dtype=torch.int64), cache)
    cached = states @ both.model.unembedding(params).T
    uncached = logits(both.model, params, tokens)
    if not uncached.dtype == cached.dtype == torch.bfloat16:
        return float("inf")
    return max(difference(uncached.float(), right), difference(cached.float(), right))


def ours_there(both: Pair) -> float:
    """A directory that we wrote gives the same logits there, and comes back from there bit by bit."""
    model, params = tiny_model(both.case, 4)
    save_language_model(both.folder / "ours", model, params, tokenizer=None)
    load = getattr(transformers(), both.case.language_class).from_pretrained
    reference, report = load(both.folder / "ours", output_loading_info=True)
    tied = set() if model.head else {FAMILIES[both.case.family].head}  # it alone may be absent
    if report["unexpected_keys"] or report["mismatched_keys"] or set(report["missing_keys"]) - tied:
        return float("inf")
    reference.save_pretrained(both.folder / "back")
    again, reread = load_language_model(both.folder / "back")
    same = (torch.equal(a, b) for a, b in zip(tree_leaves(reread), tree_leaves(params), strict=True))
    if again.config != model.config or not all(same):
        return float("inf")
    tokens, _ = ragged()
    return difference(logits(model, params, tokens), their_logits(reference.eval(), tokens))


def shards(both: Pair) -> float:
    """The largest difference of a parameter that is read from their sharded directory with its index."""
    both.reference.save_pretrained(both.folder / "shards", max_shard_size="10KB")
    if len(list((both.folder / "shards").glob("model-*-of-*.safetensors"))) < 3:
        return float("inf")
    ours = named(load_language_model(both.folder / "shards")[1])
    whole = load_file(both.folder / "theirs" / "model.safetensors")
    prefix, head = FAMILIES[both.case.family].prefix, both.model.head
    names = {name: name if name.split(".")[0] == head else prefix + name for name in ours}
    return max(float((tensor - whole[names[name]]).abs().max()) for name, tensor in ours.items())


def _scores(model: LanguageModel, params: Params, reference: Any) -> float:
    """Raw scores at each row's last valid token, which is often the EOS; padded with 60, their pad id."""
    tokens, lengths = ragged(2, vocab_size=60)
    tokens[torch.arange(4), lengths[:4] - 1] = 7
    mask = valid(tokens, lengths)
    with torch.no_grad():
        right = reference(torch.where(mask, tokens, 60), attention_mask=mask.long()).logits[:, 0]
    rows = torch.arange(len(tokens))
    return difference(scalar(params, model.hidden(params, tokens)[rows, lengths - 1]), right)


def their_scores(both: Pair) -> float:
    """A reward model that they wrote, read here."""
    reference = their_model(both.case, both.case.scalar_class, 5, num_labels=1, pad_token_id=60)
    reference.save_pretrained(both.folder / "their_rm")
    model, params, normalisation = load_scalar_model(both.folder / "their_rm")
    return _scores(model, params, reference) if normalisation == Normalisation() else float("inf")


def our_scores(both: Pair) -> float:
    """A reward model that we wrote, read there; its normalisation is passed over."""
    model, params = tiny_model(both.case, 6)
    params = with_scalar_head(model, params, generator=torch.Generator().manual_seed(1))
    folder = both.folder / "our_rm"
    save_scalar_model(folder, model, params, tokenizer=None, normalisation=Normalisation(3.0, 0.5))
    load = getattr(transformers(), both.case.scalar_class).from_pretrained
    reference, report = load(folder, output_loading_info=True)
    if any(report[kind] for kind in ("unexpected_keys", "mismatched_keys", "missing_keys")):
        return float("inf")
    return _scores(model, params, reference.eval())


class Check(NamedTuple):
    """What is measured, and the largest value that passes."""

    measure: Callable[[Pair], float]
    limit: float


CHECKS: dict[str, Check] = {
    "logits, ragged": Check(ragged_logits, 1e-5),
    "logits, cached": Check(cached_logits, 1e-5),
    "greedy": Check(greedy, 0.0),
    "bf16": Check(half_precision, 0.1),
    "ours there": Check(ours_there, 1e-5),
    "shards": Check(shards, 0.0),
    "their scores": Check(their_scores, 1e-5),
    "our scores": Check(our_scores, 1e-5),
}


def _cell(value: float, limit: float) -> str:
    text = "0" if value == 0 else f"{value:.1e}"
    return text if value <= limit else f"[bold red]{text}[/]"


def main() -> int:
    """Prints the table; 1 if a check failed."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # transformers' own deprecations
    library, begin, failed = transformers(), time.perf_counter(), 0
    table = Table(title=f"Parity with transformers {library.__version__}, torch {torch.__version__}, CPU")
    table.add_column("family")
    table.add_column("configuration", no_wrap=True)
    for name, check in CHECKS.items():
        table.add_column(f"{name}\n≤ {check.limit:g}", justify="right")
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            both = pair(case, Path(folder))
            values = {name: check.measure(both) for name, check in CHECKS.items()}
        failed += sum(not values[name] <= check.limit for name, check in CHECKS.items())
        table.add_row(case.family, case.name, *(_cell(values[name], CHECKS[name].limit) for name in values))
    console = Console(width=max(152, Console().width))
    console.print(table)
    console.print(
        "Each number is the largest difference relative to the largest |logit| or |score|; of greedy the\n"
        "share of tokens that differ, of shards the largest difference of a parameter. "
        f"{len(CASES)} configurations × {len(CHECKS)} checks\nin {time.perf_counter() - begin:.0f} s: "
        + (f"[bold red]{failed} failed[/]" if failed else "all passed")
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
