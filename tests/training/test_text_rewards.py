"""Reward models that read text: the exact ids they read, where they score, and what is too long for them."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from minirlhf import cli
from minirlhf.data.records import Message, Prompt
from minirlhf.models import gpt2
from minirlhf.models.checkpoint import Normalisation, save_language_model, save_scalar_model
from minirlhf.models.interface import with_scalar_head
from minirlhf.rollout.sampler import EOS, LENGTH, STOP, Rollout
from minirlhf.runs import InputError
from minirlhf.training.live_memory import _Counter
from minirlhf.training.memory_plan import Plan, bytes_of
from minirlhf.training.plan_phases import scoring_phase
from minirlhf.training.prompt_rows import PromptRow
from minirlhf.training.reward_sources import critic_for, of_encoder, of_reward_model, open_reward
from minirlhf.training.rewards import SCORED_ROWS
from minirlhf.training.setting import ReadingConfig, Setting
from minirlhf.training.stages import on_policy
from minirlhf.training.text_rewards import (
    ModelReader,
    encoder_scorer,
    load_encoder_reward,
    text_model_scorer,
    why_text,
)
from minirlhf.training.workspace import Checkpoint, load_policy, load_reward_model
from tests.miniature import write_tokenizer

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "i", "want", "a", "lamp", "red", "here", "is", "##s", ".", "no"]
PROMPTS = [Prompt("I want a lamp.\n", None, 11), Prompt("a red lamp", None, 12), Prompt("No.", None, 13)]


def setting(said: list[object] | None = None) -> Setting:
    show = said.append if said is not None else lambda line: None
    return Setting(0, "cpu", ReadingConfig(), show=show)


def write_letters(path: Path) -> None:
    """Another byte-level BPE: no merges, every byte an id, in another order, and <eos> at 256."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True)
    backend = tokenizers.Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<eos>"])
    backend.save(str(path))


def write_wordpiece(path: Path) -> None:
    """BERT's: lower case, [CLS] A [SEP] B [SEP] with segments 0 and 1."""
    backend = tokenizers.Tokenizer(models.WordPiece({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    backend.save(str(path))


class Made(NamedTuple):
    """Directories: a policy; reward models with its tokenizer, with another, and an encoder."""

    policy: Path
    same: Path
    other: Path
    encoder: Path
    bert: Any


def config(vocab_size: int, eos: int, **changes: Any) -> gpt2.GPT2Config:
    shape = {"n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2} | changes
    return gpt2.GPT2Config(vocab_size=vocab_size, eos_token_id=eos, initializer_range=0.3, **shape)


def write_reward(folder: Path, tokenizer: Path, shape: gpt2.GPT2Config, normalisation: Normalisation) -> None:
    model, generator = gpt2.bind(shape), torch.Generator().manual_seed(1)
    params = with_scalar_head(model, model.init(generator), generator=generator)
    save_scalar_model(folder, model, params, tokenizer=tokenizer, normalisation=normalisation)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("made")
    paths = Made(*(root / name for name in ("policy", "same", "other", "encoder")), bert=None)
    for name, write in (("bpe", write_tokenizer), ("letters", write_letters)):
        (root / name).mkdir()
        write(root / name / "tokenizer.json")
    policy = gpt2.bind(config(300, 0))
    params = policy.init(torch.Generator().manual_seed(0))
    save_language_model(paths.policy, policy, params, tokenizer=root / "bpe")
    write_reward(paths.same, root / "bpe", config(300, 0), Normalisation(0.5, 2.0))
    write_reward(paths.other, root / "letters", config(257, 256, n_embd=24), Normalisation(0.25, 0.5))
    torch.manual_seed(2)
    bert = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=len(WORDS),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=16,
            initializer_range=0.5,
            id2label={0: "reward"},
            label2id={"reward": 0},
        )
    ).eval()
    bert.save_pretrained(paths.encoder)
    write_wordpiece(paths.encoder / "tokenizer.json")
    return paths._replace(bert=bert)


def rollout(policy: Checkpoint, rows: Sequence[tuple[str, str, int]]) -> Rollout:
    """(prompt, response, stop reason) as if the policy had sampled them, garbage in the padding."""
    encode, stops = policy.tokenizer.encode, policy.model.stop_ids
    sides = [(encode(p), encode(r) + ([stops[0]] if why != LENGTH else [])) for p, r, why in rows]
    lengths = torch.tensor([len(p) + len(r) for p, r in sides])
    tokens = torch.full((len(rows), int(lengths.max()) + 3), 77)
    for b, (prompt, response) in enumerate(sides):
        tokens[b, : lengths[b]] = torch.tensor(prompt + response)
    blank, reasons = torch.zeros(tokens.shape), torch.tensor([why for *_, why in rows])
    prompt_lengths = torch.tensor([len(prompt) for prompt, _ in sides])
    return Rollout(tokens, prompt_lengths, lengths, blank, blank, reasons, torch.tensor(0))


def asked(prompts: Sequence[Prompt] = PROMPTS) -> list[PromptRow]:
    return [PromptRow([1], prompt) for prompt in prompts]


ROWS = [
    (PROMPTS[2].prompt, "Here is a lamp.", EOS),
    (PROMPTS[0].prompt, "Here is", LENGTH),
    (PROMPTS[1].prompt, "", EOS),
    (PROMPTS[2].prompt, " red lamps", STOP),
    (PROMPTS[2].prompt, "", LENGTH),
]
INDEX = torch.tensor([2, 0, 1, 2, 2])


def letters(text: str) -> list[int]:
    """The other tokenizer by hand: one id per byte, counted from the end of the byte alphabet."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True)
    written = text.replace(" ", "Ġ").replace("\n", "Ċ")
    return [alphabet.index(letter) for letter in written]


def raw(judge: Checkpoint, ids: list[int]) -> float:
    """The head on the state after the last of these ids: one row, no padding, no batch."""
    state = judge.model.hidden(judge.params, torch.tensor([ids]))[0, -1]
    return float(state @ judge.params["score"]["weight"][0])


def test_a_model_with_another_vocabulary_scores_its_own_ids_at_its_own_last_token(made: Made) -> None:
    said: list[object] = []
    policy = load_policy(made.policy, setting())
    reward = of_reward_model(made.other, setting(said))
    score = reward.scorer(policy, asked(), 8)(rollout(policy, ROWS), INDEX)
    judge = load_reward_model(made.other, setting())
    for b, (prompt, response, why) in enumerate(ROWS):
        ids = letters(prompt) + letters(response) + ([256] if why != LENGTH else [])
        assert float(score[b]) == pytest.approx((raw(judge, ids) - 0.25) / 0.5, abs=2e-5)
    assert len({round(x, 4) for x in score.tolist()}) == len(ROWS)
    assert not score.requires_grad and score.dtype == torch.float32
    assert said == [f"reward model {made.other} reads text: its tokenizer differs from that of {made.policy}"]
    reward.scorer(policy, asked(), 8)
    assert len(said) == 1


_SHAPE = {
    "vocab_size": 257,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}


@pytest.mark.parametrize(
    ("family", "shape"),
    [
        ("Llama", _SHAPE | {"num_key_value_heads": 1}),
        ("Qwen2", _SHAPE | {"num_key_value_heads": 2}),
        ("GPTNeoX", _SHAPE),
        (
            "GPTNeo",
            {
                "vocab_size": 257,
                "hidden_size": 16,
                "num_layers": 2,
                "num_heads": 2,
                "attention_types": [[["global", "local"], 1]],
                "window_size": 8,
                "max_position_embeddings": 64,
                "initializer_range": 0.3,
            },
        ),
    ],
)
def test_a_published_reward_model_of_every_family_scores_a_policy_of_another(
    made: Made, tmp_path: Path, family: str, shape: dict[str, Any]
) -> None:
    ids = {"bos_token_id": None, "eos_token_id": 256, "pad_token_id": 0}
    labels = {"id2label": {0: "reward"}, "label2id": {"reward": 0}}
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**shape, **ids, **labels)
    theirs = getattr(transformers, f"{family}ForSequenceClassification")(config).eval()
    theirs.save_pretrained(tmp_path)
    write_letters(tmp_path / "tokenizer.json")
    policy, said = load_policy(made.policy, setting()), list[object]()
    reward = open_reward(str(tmp_path), setting(said))
    score = reward.scorer(policy, asked(), 8)(rollout(policy, ROWS), INDEX)
    for b, (prompt, response, why) in enumerate(ROWS):
        row = letters(prompt) + letters(response) + ([256] if why != LENGTH else [])
        with torch.no_grad():
            logits = theirs(torch.tensor([row])).logits  # of the last token that is no pad
        assert row[-1] != 0 and float(score[b]) == pytest.approx(float(logits), abs=2e-5)
    assert "reads text: its tokenizer differs" in str(said[0])


def test_micro_batches_change_neither_scores_nor_their_order(made: Made) -> None:
    policy = load_policy(made.policy, setting())
    sampled, named = rollout(policy, ROWS), {"say": lambda line: None}
    model = partial(
        text_model_scorer, load_reward_model(made.other, setting()), policy.tokenizer, PROMPTS, **named
    )
    encoder = partial(
        encoder_scorer, load_encoder_reward(made.encoder, setting()), policy.tokenizer, PROMPTS, **named
    )
    for scorer in (model, encoder):
        whole = scorer()(sampled, INDEX)
        for size in (1, 2):
            parts = scorer(micro_batch_size=size)(sampled, INDEX)
            assert torch.allclose(parts, whole, atol=1e-5)


def test_a_model_with_the_same_tokenizer_reads_the_sampled_ids_themselves(made: Made) -> None:
    said: list[object] = []
    policy = load_policy(made.policy, setting())
    score = of_reward_model(made.same, setting(said)).scorer(policy, asked(), 8)
    # one byte after the other, where the tokenizer would merge: text would not come back to these ids
    spelled = [policy.tokenizer.encode(letter)[0] for letter in "lamp"]
    assert spelled != policy.tokenizer.encode("lamp")
    ids = torch.tensor([[*policy.tokenizer.encode("a"), *spelled]])
    blank = torch.zeros(ids.shape)
    lengths, reason = torch.tensor([ids.shape[1]]), torch.tensor([LENGTH])
    sampled = Rollout(ids, torch.tensor([1]), lengths, blank, blank, reason, torch.tensor(0))
    judge = load_reward_model(made.same, setting())
    expected = (raw(judge, ids[0].tolist()) - 0.5) / 2.0
    assert float(score(sampled, torch.tensor([0]))) == pytest.approx(expected, abs=1e-5)
    assert said == []


def test_a_plan_counts_what_an_encoder_takes_to_score(made: Made) -> None:
    judge = load_encoder_reward(made.encoder, setting())
    reader = of_encoder(made.encoder, setting()).reader
    assert reader is not None and reader.context == 16
    tokens, lengths = torch.randint(4, len(WORDS), (SCORED_ROWS, 16)), torch.full((SCORED_ROWS,), 9)
    expected = judge.model.score(judge.params, tokens, torch.zeros_like(tokens), lengths)
    torch.testing.assert_close(reader.raw(reader.params, tokens, lengths), expected)
    phase = scoring_phase(reader, 100, 40, (), device=torch.device("cpu"))
    counter = _Counter((reader.params, tokens, lengths))
    with counter, torch.no_grad():
        found = reader.raw(reader.params, tokens, lengths)
    del found
    (activations,) = phase.entries
    assert activations.size == pytest.approx(counter.peak, rel=0.02)


def test_a_stage_plans_the_encoder_that_it_asks(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[Plan] = []
    monkeypatch.setattr(on_policy, "announce", lambda plan, _: plans.append(plan) or True)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"a red lamp {n}"}) + "\n" for n in range(40)))
    files = ["--policy", made.policy, "--reward", made.encoder, "--data", prompts, "--out", tmp_path / "out"]
    sizes = ["--batch-size", "8", "--max-response", "4", "--device", "cpu"]
    assert cli.main(["ppo", *map(str, files), *sizes]) == 0
    phases = {phase.name: phase for phase in plans[0].phases}
    size = bytes_of(load_encoder_reward(made.encoder, setting()).params)
    for phase in plans[0].phases:
        assert [entry.size for entry in phase.entries if entry.owner == "reward model"] == [size], phase.name
    assert "score" in phases


def test_an_encoder_reads_prompt_and_response_as_its_tokenizer_joins_them(made: Made) -> None:
    said: list[object] = []
    policy = load_policy(made.policy, setting())
    score = of_encoder(made.encoder, setting(said)).scorer(policy, asked(), 8)(rollout(policy, ROWS), INDEX)
    prompts = ([13, 12], [4, 5, 6, 7, 12], [6, 8, 7], [13, 12], [13, 12])
    responses = ([9, 10, 6, 7, 12], [9, 10], [], [8, 7, 11], [])
    for b, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        ids = [2, *prompt, 3, *response, 3]
        kinds = [0] * (len(prompt) + 2) + [1] * (len(response) + 1)
        with torch.no_grad():
            logits = made.bert(torch.tensor([ids]), token_type_ids=torch.tensor([kinds])).logits
        assert float(score[b]) == pytest.approx(float(logits), abs=2e-5)
    assert len({round(x, 4) for x in score[:4].tolist()}) == 4
    assert score[4] != score[2]
    assert "reads text: it is an encoder" in str(said[0]) and len(said) == 1


def test_a_special_token_that_a_response_spells_is_text_to_every_reward_model(made: Made) -> None:
    policy = load_policy(made.policy, setting())
    rows = [(PROMPTS[1].prompt, "a [SEP] lamp <eos>", EOS), (PROMPTS[1].prompt, "a lamp", EOS)]
    sampled, index = rollout(policy, rows), torch.tensor([1, 1])
    judge = load_reward_model(made.other, setting())
    found = of_reward_model(made.other, setting()).scorer(policy, asked(), 8)(sampled, index)
    ids = letters("a red lamp") + letters("a [SEP] lamp <eos>") + [256]
    assert float(found[0]) == pytest.approx((raw(judge, ids) - 0.25) / 0.5, abs=2e-5)
    scores = of_encoder(made.encoder, setting()).scorer(policy, asked(), 8)(sampled, index)
    ids, kinds = [2, 6, 8, 7, 3, 6, 1, 1, 1, 7, 1, 1, 1, 3], [0] * 5 + [1] * 9
    with torch.no_grad():
        logits = made.bert(torch.tensor([ids]), token_type_ids=torch.tensor([kinds])).logits
    assert float(scores[0]) == pytest.approx(float(logits), abs=2e-5)


def test_the_end_of_a_response_that_is_too_long_is_left_out_counted_and_said(made: Made) -> None:
    said: list[object] = []
    policy = load_policy(made.policy, setting())
    long = "here is a lamp. " * 5
    rows = [(PROMPTS[1].prompt, long, EOS), (PROMPTS[1].prompt, "a lamp", EOS)]
    sampled, index = rollout(policy, rows), torch.tensor([1, 1])
    scorer = of_reward_model(made.other, setting(said)).scorer(policy, asked(), 8)
    found = scorer(sampled, index)
    judge = load_reward_model(made.other, setting())
    ids = (letters("a red lamp") + letters(long))[:64]  # full, and without a terminator
    assert float(found[0]) == pytest.approx((raw(judge, ids) - 0.25) / 0.5, abs=2e-5)
    told = "1 of 2 responses did not fit its context of 64 tokens and were scored without their end"
    assert told in str(said[1]) and "(1 of 2 so far)" in str(said[1])
    scorer(sampled, index)
    assert "(2 of 4 so far)" in str(said[2])

    said.clear()
    found = of_encoder(made.encoder, setting(said)).scorer(policy, asked(), 8)(sampled, index)
    ids, kinds = [2, 6, 8, 7, 3, 9, 10, 6, 7, 12, 9, 10, 6, 7, 12, 3], [0] * 5 + [1] * 11
    with torch.no_grad():
        logits = made.bert(torch.tensor([ids]), token_type_ids=torch.tensor([kinds])).logits
    assert float(found[0]) == pytest.approx(float(logits), abs=2e-5)
    assert "1 of 2 responses did not fit its context of 16 tokens" in str(said[1])


def test_a_response_that_just_fits_is_not_cut(made: Made) -> None:
    said: list[object] = []
    policy = load_policy(made.policy, setting())
    prompt = Prompt("ab", None, 1)
    for length, cut in ((61, 0), (62, 1)):  # of 64, beside the prompt's 2 and the terminator
        said.clear()
        scorer = of_reward_model(made.other, setting(said)).scorer(policy, asked([prompt]), 8)
        scorer(rollout(policy, [("ab", "x" * length, EOS)]), torch.tensor([0]))
        assert len(said) == 1 + cut


@pytest.mark.parametrize(
    ("which", "text", "said"),
    [
        (
            "other",
            "a" * 63,
            r"reward model .*other cannot read the prompt of line 12 \(longer than 62 tokens",
        ),
        ("other", "", r"cannot read the prompt of line 12 \(the prompt has no tokens"),
        (
            "encoder",
            "a " * 13,
            "line 12: expected at most 12 tokens, so that .* found 13; take such prompts out",
        ),
    ],
)
def test_a_prompt_without_room_for_a_response_is_refused_before_anything_is_sampled(
    made: Made, which: str, text: str, said: str
) -> None:
    policy = load_policy(made.policy, setting())
    prompts = [PROMPTS[0], Prompt(text, None, 12)]
    with pytest.raises(InputError, match=said):
        open_reward(str(getattr(made, which)), setting()).scorer(policy, asked(prompts), 8)


def test_a_reward_model_on_ids_with_too_small_a_context_is_refused_before_anything_is_sampled(
    made: Made, tmp_path: Path
) -> None:
    write_reward(tmp_path / "short", made.policy, config(300, 0, n_positions=12), Normalisation())
    reward, policy = of_reward_model(tmp_path / "short", setting()), load_policy(made.policy, setting())
    rows = [PromptRow([1] * 4, PROMPTS[0]), PromptRow([1] * 5, PROMPTS[1])]
    reward.scorer(policy, rows[:1], 8)
    with pytest.raises(
        InputError, match=r"context of 12 tokens does not hold the prompt of line 12 \(5 tokens\)"
    ):
        reward.scorer(policy, rows, 8)


def test_a_score_that_is_not_finite_names_its_source_and_row(made: Made, tmp_path: Path) -> None:
    policy = load_policy(made.policy, setting())
    (tmp_path / "wild.py").write_text(
        "import torch\n"
        "def score(prompts, responses, facts):\n"
        "    return torch.tensor([float('inf') if text == 'Here is' else 0.0 for text in responses])\n"
    )
    place = f"{tmp_path}/wild.py:score"
    scorer = open_reward(place, setting()).scorer(policy, asked(), 8)
    message = r"the reward .*wild.py:score: the score of response 1 \(to the prompt of line 11\) is inf"
    with pytest.raises(InputError, match=message):
        scorer(rollout(policy, ROWS), INDEX)


def test_the_critic_is_the_reward_model_only_where_the_policy_can_read_it(made: Made, tmp_path: Path) -> None:
    policy = load_policy(made.policy, setting())
    said: list[object] = []
    critic = critic_for(of_reward_model(made.same, setting()), policy, setting(said))
    judge = load_reward_model(made.same, setting())
    assert torch.equal(critic["wte"]["weight"], judge.params["wte"]["weight"])
    assert torch.equal(critic["score"]["weight"], judge.params["score"]["weight"] / 2.0) and not said
    write_reward(tmp_path / "wide", made.policy, config(300, 0, n_embd=32), Normalisation())
    # the same shape with another tokenizer: its rows are of other tokens
    (tmp_path / "swapped").mkdir()
    settings = json.loads((made.policy / "tokenizer.json").read_text())
    vocabulary = settings["model"]["vocab"]
    vocabulary["!"], vocabulary["?"] = vocabulary["?"], vocabulary["!"]
    (tmp_path / "swapped/tokenizer.json").write_text(json.dumps(settings))
    write_reward(tmp_path / "alike", tmp_path / "swapped", config(300, 0), Normalisation())
    sources = [open_reward(str(each), setting()) for each in (made.other, made.encoder)]
    sources += [open_reward(str(tmp_path / name), setting()) for name in ("wide", "alike")]
    for reward in sources:
        said.clear()
        critic = critic_for(reward, policy, setting(said))
        assert critic["wte"]["weight"] is policy.params["wte"]["weight"]
        assert critic["score"]["weight"].shape == (1, 16)
        assert len(said) == 1 and f"since {reward.name} has none" in str(said[0])
    assert torch.equal(
        critic["score"]["weight"], critic_for(sources[0], policy, setting())["score"]["weight"]
    )


CHAT = Prompt("\n\nHuman: hi\n\nAssistant:", None, 5, (Message("user", "hi"),))
TRANSCRIPT = "\n\nHuman: hi\n\nAssistant:"
RENDERED = [*"<user>hi", None, *"<assistant>"]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}END{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize(
    ("ours", "theirs", "answer", "expected"),
    [
        (False, False, " Here", [*TRANSCRIPT, *" Here", None]),
        (False, False, "Here", [*TRANSCRIPT, *"Here", None]),
        (False, True, " Here", [*RENDERED, *"Here", None]),
        (False, True, "  Here", [*RENDERED, *" Here", None]),
        (True, False, "Here", [*TRANSCRIPT, *" Here", None]),
        (True, True, " Here", [*RENDERED, *" Here", None]),
        (True, True, "", [*RENDERED, None]),
    ],
)
def test_a_conversation_is_rendered_again_by_the_reward_models_own_template(
    made: Made, tmp_path: Path, ours: bool, theirs: bool, answer: str, expected: list[str | None]
) -> None:
    for name, templated, end in (("policy", ours, "<|endoftext|>"), ("other", theirs, "<eos>")):
        folder = tmp_path / name
        folder.mkdir()
        for file in getattr(made, name).iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        if templated:
            (folder / "chat_template.jinja").write_text(TEMPLATE.replace("END", end))
    policy, judge = (
        load_policy(tmp_path / "policy", setting()),
        load_reward_model(tmp_path / "other", setting()),
    )
    sampled = rollout(policy, [("whatever was sampled from", answer, EOS)])
    (found,) = ModelReader(judge, policy.tokenizer, [CHAT]).read(sampled, torch.tensor([0]))
    assert found.ids == [256 if letter is None else letters(letter)[0] for letter in expected]
    plain = Prompt("plain text", None, 6)  # no template touches it
    (found,) = ModelReader(judge, policy.tokenizer, [plain]).read(sampled, torch.tensor([0]))
    assert found.ids == [*letters("plain text"), *letters(answer), 256]


def test_why_a_model_reads_text_is_the_first_thing_that_differs(made: Made, tmp_path: Path) -> None:
    policy, same = load_policy(made.policy, setting()), load_reward_model(made.same, setting())
    assert why_text(policy, same) is None
    assert why_text(policy, load_reward_model(made.other, setting())) == "its tokenizer differs"
    for file in made.same.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for changes in ({"eos_id": 5}, {"bos_id": 5}):
        other = policy._replace(tokenizer=replace(policy.tokenizer, **changes))
        assert why_text(other, same) == "the tokens that begin or end its texts differ"
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|endoftext|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    assert why_text(policy, load_reward_model(tmp_path, setting())) == "its chat template differs"


@pytest.mark.parametrize(
    ("breakage", "said"),
    [
        ("no tokenizer", "an encoder reads text by its own tokenizer.json"),
        ("no separators", r"expected a post-processor that joins two texts"),
        ("no json", "expected a tokenizer.json, found none that loads"),
        ("too many words", "its tokenizer has 15 ids, its model a vocabulary of only 14"),
    ],
)
def test_an_encoder_without_a_fitting_tokenizer_is_refused(
    made: Made, tmp_path: Path, breakage: str, said: str
) -> None:
    for file in made.encoder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    file = tmp_path / "tokenizer.json"
    settings = json.loads(file.read_text())
    if breakage == "no tokenizer":
        file.unlink()
    elif breakage == "no json":
        file.write_text("{")
    elif breakage == "no separators":
        file.write_text(json.dumps(settings | {"post_processor": None}))
    else:
        settings["model"]["vocab"]["more"] = 14
        file.write_text(json.dumps(settings))
    with pytest.raises(InputError, match=said):
        of_encoder(tmp_path, setting())
