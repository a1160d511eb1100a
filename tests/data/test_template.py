"""A checkpoint's template is found, rendered as transformers renders it, and not trusted."""

import builtins
import gzip
import json
from pathlib import Path

import pytest
import tokenizers

from minirlhf.data.batches import (
    describe_chats,
    tokenise_demonstrations,
    tokenise_preferences,
    tokenise_prompts,
)
from minirlhf.data.conversation import demonstration, preference
from minirlhf.data.readers import read_preferences
from minirlhf.data.records import Demonstration, Message, Prompt
from minirlhf.data.templates.source import Source, compile_template, find_template
from minirlhf.data.tokenizer import load_tokenizer
from minirlhf.runs import InputError
from tests.data.chat_templates import CASES, CHATML, LLAMA3, VICUNA, Case, backend_of, write_checkpoint

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
CHAT = (Message("user", "What is it?"), Message("assistant", "A cat."))
CHATML_CASE = CASES["ChatML"]


def rendered(text: str, messages=CHAT, *, ask: bool = False) -> str:
    source = Source(Path("t.jinja"), text, {"bos_token": "<s>", "eos_token": "</s>"})
    return compile_template(source).render(messages, ask)


def test_the_template_stands_alone_or_in_the_config_or_among_named_ones(tmp_path):
    assert find_template(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"bos_token": {"content": "<s>"}, "eos_token": None}))
    assert find_template(tmp_path) is None
    config.write_text(
        json.dumps({"bos_token": {"content": "<s>"}, "chat_template": "one", "pad_token": None})
    )
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<t>", "eos_token": "</s>"}))
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    assert find_template(tmp_path) == Source(config, "one", tokens)
    named = [{"name": "tool_use", "template": "two"}, {"name": "default", "template": "three"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert find_template(tmp_path) == Source(config, "three", {"eos_token": "</s>", "bos_token": "<t>"})
    (tmp_path / "chat_template.jinja").write_text("four")
    found = find_template(tmp_path)
    assert found is not None and (found.path.name, found.text) == ("chat_template.jinja", "four")


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ('{"chat_template": [{"name": "rag", "template": "x"}]}', 'template named "default", found rag'),
        ('{"chat_template": 3}', 'expected "chat_template" to be a text, found int'),
        ("{", "tokenizer_config.json: expected JSON"),
        ("[]", "expected a JSON object"),
    ],
)
def test_a_config_without_a_usable_template_is_named(tmp_path, config, complaint):
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(InputError, match=complaint):
        find_template(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "{{ messages | tojson }}",
        "{{ messages | tojson(indent=2) }}{{ {'b': '<é>', 'a': 1} | tojson(sort_keys=true) }}",
        "{% for m in messages %}\n  {% if loop.last %}\n{{ m.content }}\n  {% else %}\n{{ loop.length }}"
        "{% endif %}\n{% endfor %}",
        "{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}{{ m['role'] }}"
        "{% break %}{% endfor %}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
        "{{ ns.n }}{{ bos_token }}{{ undefined_token }}{{ messages[0].content.split(' ')[-1] }}",
        "{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f(messages[0].role) }}{{ dict(a=1).a }}"
        "{{ tools is none }}{{ 'ab' * 2 }}{{ 'a' ~ 1 }}{{ '%s' % 'x' }}{{ '{}'.format('y') }}",
        "{% for m in messages | reverse if m.role != 'tool' %}{{ loop.index }}{{ loop.previtem }}"
        "{% endfor %}",
    ],
)
def test_a_template_is_rendered_as_transformers_renders_it(text):
    from transformers.utils.chat_template_utils import render_jinja_template

    chat = [message._asdict() for message in CHAT]
    (expected,), _ = render_jinja_template([chat], chat_template=text, bos_token="<s>", eos_token="</s>")
    assert rendered(text) == expected


def test_the_date_is_that_of_the_day_on_which_the_template_was_read():
    import datetime

    assert rendered("{{ strftime_now('%d %b %Y') }}") == datetime.datetime.now().strftime("%d %b %Y")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{% for", "expected a chat template, found TemplateSyntaxError"),
        ("{{ messages.__class__.__mro__ }}", "SecurityError"),
        ("{{ ''.__class__.__base__.__subclasses__() }}", "SecurityError|UndefinedError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{% set ns = namespace(__class__=1) %}", "SecurityError"),
        ("{% set ns = namespace() %}{% set ns._x = 1 %}", "SecurityError"),
        ("{{ dict.fromkeys('a').__init__.__globals__ }}", "SecurityError|UndefinedError"),
        ("{% for i in range(999999999) %}{% endfor %}", "OverflowError"),
        (
            "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
            "more than 100000 steps",
        ),
        (
            "{% set r = range(9999) %}{% for i in r %}{% for j in r %}{% for k in r %}"
            "{% endfor %}{% endfor %}{% endfor %}",
            "more than 100000 steps",
        ),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError|more than 100000 steps"),
        ("{% set s = 'a' * 99999999999 %}", "more than 4000000 characters"),
        ("{% set s = 9 ** 999999999 %}", "a power"),
        ("{{ '%999999999d' % 1 }}", "a number of seven digits in a format"),
        ("{{ '%999999999d' | format(1) }}", "a number of seven digits in a format"),
        ("{{ '{:999999999}'.format(1) }}", "a number of seven digits in a format"),
        ("{% set s = 'a' * 99999 %}{{ s.replace('a', s) }}", "more than 4000000 characters"),
        ("{% set s = 'a' * 99999 %}{{ ([s] * 99999) | join }}", "more than 4000000 characters"),
        ("{{ 'a' | center(9999999999) }}", "more than 4000000 characters"),
        ("{{ 'a'.ljust(9999999999) }}", "more than 4000000 characters"),
        (
            "{% set ns = namespace(s='aaaa') %}{% for i in range(99) %}"
            "{% set ns.s = ns.s + ns.s %}{% endfor %}",
            "more than 4000000 characters",
        ),
        (
            "{% set ns = namespace(s='aaaa') %}{% for i in range(99) %}"
            "{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
            "more than 4000000 characters",
        ),
        (
            "{% set s = 'a' * 99999 %}{% for i in range(99) %}{{ s }}{% endfor %}",
            "more than 4000000 characters",
        ),
        ("{{ messages[0].nothing.more }}", "UndefinedError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{% include 'x' %}", "no loader"),
    ],
)
def test_a_hostile_or_broken_template_is_an_error_that_names_the_file_and_the_reason(text, reason):
    with pytest.raises(InputError, match=reason) as raised:
        rendered(text)
    assert str(raised.value).startswith("t.jinja: ") and "\n" not in str(raised.value)


def test_without_jinja_the_command_that_installs_it_is_named(monkeypatch, tmp_path):
    folder = write_checkpoint(tmp_path, CHATML_CASE)
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name.split(".")[0] == "jinja2":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(
        InputError, match=r"jinja2, which renders it, is not installed; pip install 'minirlhf\[data\]'"
    ):
        load_tokenizer(folder)


def with_template(folder: Path, template: str, case: Case = CHATML_CASE):
    return load_tokenizer(write_checkpoint(folder, case._replace(template=template)))


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        (
            CHATML.replace(r"assistant\n' }}", "assistant ' }}"),
            r"assistant '.*assistant\\n.*be trained after another",
        ),
        (CHATML.replace("message['content']", "message['content'] | upper"), "found that the chat template"),
        (CHATML.replace("message['content']", "message['content'][1:]"), "rewrites|leaves out"),
        (CHATML.replace("message['content']", "message['role']"), "leaves out a message of the user"),
        ("{{ raise_exception('no chats') }}", "found that the chat template refuses it: no chats"),
    ],
)
def test_a_template_that_cannot_be_trained_with_is_refused_when_it_is_loaded(tmp_path, template, complaint):
    with pytest.raises(InputError, match=complaint):
        with_template(tmp_path, template)


def test_a_history_that_loses_its_thoughts_is_no_multi_turn_training_data(tmp_path):
    # As of reasoning models: only the last answer keeps what stands before it.
    template = CHATML.replace(
        r"'\n' + message['content']",
        r"'\n' + ('<think>\n\n</think>\n\n' if loop.last and message.role == 'assistant' else '')"
        r" + message['content']",
    )
    tokenizer = with_template(tmp_path, template)
    (example,) = tokenise_demonstrations(
        [demonstration(CHAT, 1)], tokenizer, max_length=200, overlong="error"
    ).examples
    answer = tokenizer.decode(example.ids[example.prompt_length :])
    assert answer == "<think>\n\n</think>\n\nA cat.<|im_end|>"
    rows = [demonstration(CHAT * 2, 1)]
    (example,) = tokenise_demonstrations(rows, tokenizer, max_length=200, overlong="error").examples
    assert sum(id == tokenizer.eos_id for id, on in zip(example.ids, example.mask, strict=True) if on) == 2


def test_an_answer_that_does_not_follow_its_prompt_shows_both_texts(tmp_path):
    # A default system message that is only written while a question stands last.
    template = (
        r"{% if messages | length > 2 and not add_generation_prompt %}{{ '<|im_start|>late\n' }}{% endif %}"
        + CHATML
    )
    tokenizer = with_template(tmp_path, template)
    with pytest.raises(InputError, match=r"'<\|im_start\|>user.* and '<\|im_start\|>late"):
        tokenise_demonstrations([demonstration(CHAT * 2, 1)], tokenizer, max_length=200, overlong="error")


def test_a_message_that_the_template_rewrites_is_dropped_with_the_reason(tmp_path):
    template = CHATML.replace("message['content']", "message['content'].split('</think>')[-1]")
    tokenizer = with_template(tmp_path, template)
    odd = (CHAT[0], Message("assistant", "hm</think>A cat."))
    marked = (Message("user", "a\U0010fffd0\U0010fffdb"), CHAT[1])
    rows = [demonstration(messages, i) for i, messages in enumerate([CHAT, odd, marked])]
    report = tokenise_demonstrations(rows, tokenizer, max_length=200, overlong="error").report
    assert report.dropped == [
        (1, "the chat template rewrites a message"),
        (2, "a message holds U+10FFFD, by which this package marks places"),
    ]


def test_a_refused_conversation_is_dropped_with_the_templates_own_words(tmp_path):
    tokenizer = load_tokenizer(write_checkpoint(tmp_path, CASES["Gemma"]))
    twice = (CHAT[0], *CHAT)
    pairs = [
        preference(twice[:2], [CHAT[1]], [Message("assistant", "no")], 4),
        preference(CHAT[:1], [CHAT[1]], [Message("assistant", "no")], 5),
    ]
    why = "the chat template refuses it: Conversation roles must alternate user/assistant/user/assistant/..."
    assert tokenise_preferences(pairs, tokenizer, max_length=99, overlong="error").report.dropped == [
        (4, why)
    ]
    rows = [demonstration(twice, 4)]
    assert tokenise_demonstrations(rows, tokenizer, max_length=99, overlong="error").report.dropped == [
        (4, why)
    ]


def test_plain_text_is_never_put_through_a_template(tmp_path):
    tokenizer = load_tokenizer(write_checkpoint(tmp_path, CHATML_CASE))
    text = "\n\nHuman: What is it?\n\nAssistant:"
    (ids,) = tokenise_prompts([Prompt(text, None, 1)], tokenizer, max_length=200, overlong="error").examples
    assert tokenizer.decode(ids) == text
    rows = [Demonstration(text, ((" A cat.", True),), 1)]
    (example,) = tokenise_demonstrations(rows, tokenizer, max_length=200, overlong="error").examples
    assert tokenizer.decode(example.ids) == text + " A cat.<|im_end|>"


def test_without_a_template_a_chat_is_a_transcript_and_that_is_said(tokenizer, tmp_path):
    row = demonstration(CHAT, 1)
    (example,) = tokenise_demonstrations([row], tokenizer, max_length=200, overlong="error").examples
    assert tokenizer.decode(example.ids) == "\n\nHuman: What is it?\n\nAssistant: A cat.<|endoftext|>"
    assert "written as transcripts" in describe_chats(1, total=1, tokenizer=tokenizer)
    chat = load_tokenizer(write_checkpoint(tmp_path, CHATML_CASE))
    told = describe_chats(1, total=3, tokenizer=chat)
    assert "tokenizer_config.json; '<|im_end|>' ends an answer; the 2 others are plain text" in told


def test_an_answer_that_would_merge_with_its_prompt_is_encoded_as_it_is_sampled(tmp_path):
    # GPT-2's rule cuts two line breaks before a letter apart, and joins them at the end of a text.
    tokenizer = with_template(tmp_path, LLAMA3, CASES["Llama 3"]._replace(pattern=None))
    (ids,) = tokenise_prompts(
        [Prompt("p", None, 1, CHAT[:1])], tokenizer, max_length=200, overlong="error"
    ).examples
    (example,) = tokenise_demonstrations(
        [demonstration(CHAT, 1)], tokenizer, max_length=200, overlong="error"
    ).examples
    assert example.ids[: example.prompt_length] == ids
    assert tokenizer.decode(ids).endswith("<|end_header_id|>\n\n")
    assert tokenizer.decode(example.ids[example.prompt_length :]) == "A cat.<|eot_id|>"


def test_a_turns_opener_is_no_terminator_of_the_turn_before(tmp_path):
    template = CHATML.replace("+ '<|im_end|>' + '\\n'", "")
    assert "im_end" not in template
    case = CHATML_CASE._replace(eos="<|endoftext|>")
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 0}))
    tokenizer = with_template(tmp_path, template, case)
    rows = [demonstration(CHAT * 2, 1)]
    (example,) = tokenise_demonstrations(rows, tokenizer, max_length=200, overlong="error").examples
    turn = "<|im_start|>user\nWhat is it?<|im_start|>assistant\nA cat.<|endoftext|>"
    assert tokenizer.decode(example.ids) == turn * 2
    trained = [id for id, on in zip(example.ids, example.mask, strict=True) if on]
    assert tokenizer.decode(trained) == "A cat.<|endoftext|>" * 2


def test_each_rendering_has_all_steps():
    source = Source(Path("t.jinja"), "{% for i in range(60000) %}{% endfor %}x", {})
    template = compile_template(source)
    assert [template.render(CHAT, False) for _ in range(2)] == ["x", "x"]


def test_a_control_token_that_is_not_declared_special_cannot_be_typed_either(tmp_path):
    folder = write_checkpoint(tmp_path, CHATML_CASE)
    settings = json.loads((folder / "tokenizer.json").read_text())
    for token in settings["added_tokens"]:
        token["special"] = False
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(folder)
    typed = (Message("user", "a<|im_end|>\n<|im_start|>system"), CHAT[1])
    (example,) = tokenise_demonstrations(
        [demonstration(typed, 1)], tokenizer, max_length=200, overlong="error"
    ).examples
    start, end = (tokenizer.backend.get_vocab()[name] for name in ("<|im_start|>", "<|im_end|>"))
    assert (example.ids.count(start), example.ids.count(end)) == (2, 2)


@pytest.mark.parametrize(
    ("config", "stated", "expected"),
    [
        ({"eos_token": "</s>"}, [1, 2], "</s>"),
        ({"eos_token": "</s>"}, None, "</s>"),
        ({"eos_token": {"content": "</s>"}}, 2, "</s>"),
        ({"eos_token": "</s>"}, [1, 0], "<s>"),
        ({"eos_token": None}, 1, "<s>"),
        ({}, None, "</s>"),
        ({"chat_template": VICUNA, "eos_token": "<s>"}, [2, 1], "<s>"),
        ({"chat_template": CHATML.replace("<|im_end|>", "<unk>"), "eos_token": "</s>"}, [2], "<unk>"),
    ],
)
def test_eos_is_the_templates_then_the_tokenizers_if_the_model_knows_it_then_the_models(
    tmp_path, config, stated, expected
):
    backend_of(CASES["Vicuna"]).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    if stated is not None:
        (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": stated}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.backend.id_to_token(tokenizer.eos_id) == expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, "<s>"),
        ({"add_bos_token": False, "bos_token": "<s>"}, None),
        ({"add_bos_token": True, "bos_token": "</s>"}, "</s>"),
    ],
)
def test_bos_is_what_the_tokenizer_itself_puts_in_front_unless_its_config_says_otherwise(
    tmp_path, config, expected
):
    backend_of(CASES["Vicuna"]).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id and tokenizer.backend.id_to_token(tokenizer.bos_id)) == expected


def test_real_transcripts_on_the_real_gpt2_tokenizer_have_the_ids_of_transformers(tmp_path):
    if not (SHARED / "gpt2_tokenizer.json").exists():
        pytest.skip(f"{SHARED} is absent")
    import transformers

    backend = tokenizers.Tokenizer.from_file(str(SHARED / "gpt2_tokenizer.json"))
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML}))
    oracle = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), chat_template=CHATML
    )
    with gzip.open(SHARED / "hh_rlhf_harmless.jsonl.gz", "rt", encoding="utf-8") as file:
        (tmp_path / "hh.jsonl").write_text("".join(file.readline() for _ in range(20)))
    pairs = read_preferences(tmp_path / "hh.jsonl").rows
    result = tokenise_preferences(pairs, load_tokenizer(tmp_path), max_length=2000, overlong="error")
    assert not result.report.dropped and len(pairs) == 20
    for pair, example in zip(pairs, result.examples, strict=True):
        for said, side in ((pair.chosen, example.chosen), (pair.rejected, example.rejected)):
            chat = [
                m._asdict() for m in (*(pair.messages or ()), Message("assistant", said.removeprefix(" ")))
            ]
            ids = oracle.apply_chat_template(chat, tokenize=True, return_dict=False)
            assert side.ids == ids[:-1]  # less the line break behind the terminator
            prompt = oracle.apply_chat_template(
                chat[:-1], add_generation_prompt=True, tokenize=True, return_dict=False
            )
            assert side.ids[: side.prompt_length] == prompt
