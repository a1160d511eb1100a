"""Who generates: each system takes GPT-2's weights once, then a workload, and answers with what it cost.

A system is a function that makes it ready and returns one that runs a workload. Only tokens that were asked
for count: where a system has to go on with rows that have ended, that is its cost, not its output.
"""

import atexit
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from workloads import Workload

from minirlhf.models.checkpoint import save_language_model
from minirlhf.models.interface import LanguageModel, Params
from minirlhf.objectives.sampling import sampling_law
from minirlhf.rollout import recorded, weights
from minirlhf.rollout.sampler import generate


class Cost(NamedTuple):
    """Seconds of one run: whole; reading prompts and decoding; packing, compiling or capturing in it.

    cache: of ours, bytes per live token's bytes when the cache was fullest.
    """

    seconds: float
    prefill: float
    decode: float
    once: float = 0.0
    cache: float | None = None


class Subject(NamedTuple):
    """What everyone is given."""

    model: LanguageModel
    params: Params
    device: torch.device


Run = Callable[[Workload], Cost]


def ours(subject: Subject, *, kind: weights.Weights, refill: bool = True) -> Run:
    """minirlhf. Without `refill` a batch is finished before the next begins."""
    model, params, device = subject
    spent = {"prefill": 0.0, "decode": 0.0, "once": 0.0}

    def states(given: Params, tokens: torch.Tensor, *rest: Any) -> torch.Tensor:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():  # nobody can wait in a graph
            return model.states(given, tokens, *rest)
        start, before = _now(device), spent["once"]
        got = model.states(given, tokens, *rest)
        took = _now(device) - start - (spent["once"] - before)
        spent["prefill" if tokens.shape[1] > 1 else "decode"] += took
        return got

    def timed_once(work: Callable[..., Any]) -> Callable[..., Any]:
        def done(*given: Any) -> Any:
            start = _now(device)
            made = work(*given)
            spent["once"] += _now(device) - start
            return made

        return done

    for each in (
        weights.Packed,
        weights.Reordered,
        weights.Int8,
    ):  # prepared in the first product, which is prefill's
        each.prepare = timed_once(each.prepare)
    recorded.Steps.make_ready = timed_once(recorded.Steps.make_ready)
    timed = model._replace(states=states)

    def run(workload: Workload) -> Cost:
        spent.update(prefill=0.0, decode=0.0, once=0.0)
        step = len(workload.prompts) if refill else workload.batch
        start, ratio = _now(device), 0.0
        for first in range(0, len(workload.prompts), step):
            prompts = workload.prompts[first : first + step]
            new = workload.new[first : first + step]
            index = torch.arange(len(prompts))
            rollout = generate(
                timed, params, prompts, law=sampling_law, max_new_tokens=new, stop_ids=[], seed=0,
                prompt_index=index, sample_index=index, slots=workload.batch, weights=kind,
            )  # fmt: skip
            use = rollout.cache
            assert use is not None
            assert (rollout.lengths - rollout.prompt_lengths).tolist() == new
            ratio = max(ratio, use.pages * 32 / use.tokens)
        whole = _now(device) - start
        return Cost(whole, spent["prefill"], whole - spent["prefill"] - spent["once"], spent["once"], ratio)

    return run


def hugging_face(subject: Subject, *, static: bool = False) -> Run:
    """transformers' `generate`: batches of the given size, sorted by length, left padding as it asks for."""
    import transformers

    model, params, device = subject
    theirs: Any
    with tempfile.TemporaryDirectory() as folder:
        save_language_model(Path(folder) / "model", model, params, tokenizer=None)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(Path(folder) / "model")
    theirs = theirs.to(device=device, dtype=next(iter(params["wte"].values())).dtype).eval()
    options: dict[str, Any] = {"do_sample": True, "top_k": 0, "use_cache": True, "pad_token_id": 0}
    options |= {"eos_token_id": None, "output_scores": False}
    if static:
        options |= {"cache_implementation": "static"}
        theirs.forward = torch.compile(theirs.forward)  # transformers itself does so on CUDA only

    def batch(prompts: list[list[int]], new: list[int]) -> None:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(each)) + each for each in prompts], device=device)
        mask = torch.tensor(
            [[0] * (longest - len(each)) + [1] * len(each) for each in prompts], device=device
        )
        limits = torch.tensor(new, device=device)

        def done(so_far: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return so_far.shape[1] - longest >= limits

        stopping = transformers.StoppingCriteriaList([done])
        with torch.no_grad():
            theirs.generate(
                ids, attention_mask=mask, max_new_tokens=max(new), stopping_criteria=stopping, **options
            )

    def run(workload: Workload) -> Cost:
        order = sorted(range(len(workload.prompts)), key=lambda row: -len(workload.prompts[row]))
        chunks = [order[at : at + workload.batch] for at in range(0, len(order), workload.batch)]
        prefill = 0.0
        if len(chunks) == 1:
            start = _now(device)
            batch([workload.prompts[row] for row in order], [1] * len(order))
            prefill = _now(device) - start
        start = _now(device)
        for rows in chunks:
            batch([workload.prompts[row] for row in rows], [workload.new[row] for row in rows])
        whole = _now(device) - start
        return Cost(whole, prefill, whole - prefill)

    return run


def ctranslate2(subject: Subject, *, precision: str) -> Run:
    """CTranslate2's own batching: examples sorted by length, as many rows at a time as ours has slots."""
    import transformers

    library = import_module("ctranslate2")  # by name: a type checker need not have it

    model, params, _ = subject
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)  # when the worker ends: it reads from there until then
    save_language_model(folder / "model", model, params, tokenizer=None)
    words = {f"t{number}": number for number in range(model.config.vocab_size)}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=_words(words), **dict.fromkeys(("bos_token", "eos_token", "unk_token"), "t50256")
    )
    tokenizer.save_pretrained(folder / "model")
    library.converters.TransformersConverter(str(folder / "model")).convert(str(folder / "converted"))
    device = "cuda" if subject.device.type == "cuda" else "cpu"
    threads = {} if device == "cuda" else {"intra_threads": torch.get_num_threads(), "inter_threads": 1}
    start = time.perf_counter()
    theirs = library.Generator(str(folder / "converted"), device=device, compute_type=precision, **threads)
    once = time.perf_counter() - start

    def run(workload: Workload) -> Cost:
        prompts = [[f"t{number}" for number in each] for each in workload.prompts]
        settings = {
            "max_batch_size": workload.batch, "include_prompt_in_result": False, "sampling_topk": 0,
        }  # fmt: skip
        if len(set(workload.new)) == 1:
            start = time.perf_counter()
            theirs.generate_batch(prompts, max_length=1, min_length=1, **settings)
            prefill = time.perf_counter() - start
            start = time.perf_counter()
            new = workload.new[0]
            theirs.generate_batch(prompts, max_length=new, min_length=new, **settings)
        else:
            prefill, start = 0.0, time.perf_counter()
            stop = lambda step: step.step + 1 >= workload.new[step.batch_id]  # noqa: E731
            most = max(workload.new)
            theirs.generate_batch(prompts, max_length=most, min_length=most, callback=stop, **settings)
        whole = time.perf_counter() - start
        return Cost(whole, prefill, whole - prefill, once)

    return run


def vllm(subject: Subject) -> Run:
    """vLLM's offline engine, with as many sequences at a time as ours has slots."""
    library = import_module("vllm")
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)  # when the worker ends: it reads from there until then
    save_language_model(folder, subject.model, subject.params, tokenizer=None)
    dtype = str(subject.params["wte"]["weight"].dtype).removeprefix("torch.")
    engines: dict[int, Any] = {}

    def run(workload: Workload) -> Cost:
        once = 0.0
        if workload.batch not in engines:
            start = time.perf_counter()
            engines[workload.batch] = library.LLM(
                model=str(folder), dtype=dtype, skip_tokenizer_init=True, max_num_seqs=workload.batch,
                enable_prefix_caching=False,
            )  # fmt: skip
            once = time.perf_counter() - start
        prompts = [{"prompt_token_ids": each} for each in workload.prompts]
        wanted = [
            library.SamplingParams(max_tokens=n, min_tokens=n, ignore_eos=True, detokenize=False)
            for n in workload.new
        ]
        start = time.perf_counter()
        engines[workload.batch].generate(prompts, wanted, use_tqdm=False)
        whole = time.perf_counter() - start
        return Cost(whole, 0.0, whole, once)

    return run


ACCOUNTED = {"minirlhf": weights.fastest, "minirlhf int8": weights.int8}
"""Those of which it is known where a step's time goes."""

SYSTEMS: dict[str, Callable[[Subject], Run]] = {
    "minirlhf": partial(ours, kind=weights.fastest),
    "minirlhf, plain weights": partial(ours, kind=weights.as_they_are),
    "minirlhf, no refill": partial(ours, kind=weights.fastest, refill=False),
    "minirlhf int8": partial(ours, kind=weights.int8),
    "transformers": hugging_face,
    "transformers, static": partial(hugging_face, static=True),
    "vLLM": vllm,
    "CTranslate2": partial(ctranslate2, precision="float32"),
    "CTranslate2 int8": partial(ctranslate2, precision="int8"),
}


def _words(words: dict[str, int]) -> Any:
    import tokenizers

    return tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="t0"))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
