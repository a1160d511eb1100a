"""Chat templates as published checkpoints carry them, and small tokenizers with their special tokens."""

import json
from pathlib import Path
from typing import NamedTuple

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "the cat sat on the mat. ",
    "user assistant system model",
    "What is it? A cat.",
    "\n\n  two\n spaces\n",
]
ALTERNATE = "Conversation roles must alternate user/assistant/user/assistant/..."

CHATML = (
    r"{% for message in messages %}"
    r"{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    r"{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _chatml_with(system: str) -> str:
    return CHATML.replace(
        "{{'<|im_start|>' + message",
        "{% if loop.first and messages[0]['role'] != 'system' %}"
        r"{{ '<|im_start|>system\n" + system + r"<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message",
    )


SMOLLM2 = _chatml_with("You are a helpful AI assistant named SmolLM, trained by Hugging Face")
QWEN2 = _chatml_with("You are a helpful assistant.")
ZEPHYR = r"""{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>
'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
LLAMA2 = (
    r"{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    r"{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    r"{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    r"{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('"
    + ALTERNATE
    + r"') }}{% endif %}{% if loop.index0 == 0 and system_message != false %}"
    r"{% set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + message['content'] %}"
    r"{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    r"{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    r"{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    r"{% set loop_messages = messages %}{% for message in loop_messages %}"
    r"{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    r"+ message['content'] | trim + '<|eot_id|>' %}"
    r"{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    r"{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL_1 = (
    r"{{ bos_token }}{% for message in messages %}"
    r"{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('"
    + ALTERNATE
    + r"') }}{% endif %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    r"{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}{% else %}"
    r"{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
MISTRAL_3 = r"""{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (loop.index0 % 2 == 0) %}
        {{- raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\n\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- endif %}
{%- endfor %}
"""
GEMMA = (
    r"{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    r"{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}"
    r"{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('"
    + ALTERNATE
    + r"') }}{% endif %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}"
    r"{% set role = message['role'] %}{% endif %}"
    r"{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    r"{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
PHI3 = (
    r"{% for message in messages %}{% if message['role'] == 'system' %}"
    r"{{'<|system|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}"
    r"{{'<|user|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'assistant' %}"
    r"{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
    r"{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
DEEPSEEK = (
    r"{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    r"{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    r"{{ 'User: ' + message['content'] + '\n\n' }}{% elif message['role'] == 'assistant' %}"
    r"{{ 'Assistant: ' + message['content'] + eos_token }}{% elif message['role'] == 'system' %}"
    r"{{ message['content'] + '\n\n' }}{% endif %}{% endfor %}"
    r"{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
VICUNA = (
    r"{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    r"{% elif message['role'] == 'user' %}{{ 'USER: ' + message['content'] + '\n' }}"
    r"{% else %}{{ 'ASSISTANT: ' + message['content'] + '\n' }}{% endif %}{% endfor %}"
    r"{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


class Case(NamedTuple):
    """A template and what its checkpoint's tokenizer is like.

    system: "kept", or why a conversation with a system message is dropped.
    adds_bos: whether the tokenizer itself writes BOS, as its post-processor says.
    strips: whether its special tokens take the whitespace behind them.
    pieces: "bytes" as GPT-2's, cut by `pattern`; "first" and "every" as SentencePiece's, with a space before
        the first text or before every one.
    """

    template: str
    bos: str | None
    eos: str
    terminator: str
    specials: tuple[str, ...]
    system: str = "kept"
    pieces: str = "bytes"
    adds_bos: bool = False
    strips: bool = False
    pattern: str | None = None


_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
REFUSED = "the chat template refuses it: "
_IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_S = ("<unk>", "<s>", "</s>")
CASES = {
    "ChatML": Case(CHATML, None, "<|im_end|>", "<|im_end|>", _IM),
    "SmolLM2": Case(SMOLLM2, "<|im_start|>", "<|im_end|>", "<|im_end|>", _IM),
    "Qwen2": Case(QWEN2, None, "<|endoftext|>", "<|im_end|>", _IM, pattern=_LLAMA3),
    "Zephyr": Case(ZEPHYR, "<s>", "</s>", "</s>", _S, pieces="every", adds_bos=True),
    "Llama 2": Case(LLAMA2, "<s>", "</s>", "</s>", _S, pieces="every", adds_bos=True),
    "Llama 3": Case(
        LLAMA3,
        "<|begin_of_text|>",
        "<|eot_id|>",
        "<|eot_id|>",
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        adds_bos=True,
        pattern=_LLAMA3,
    ),
    "Mistral 0.1": Case(
        MISTRAL_1,
        "<s>",
        "</s>",
        "</s>",
        _S,
        system=REFUSED + ALTERNATE,
        pieces="every",
        adds_bos=True,
    ),
    "Mistral 0.3": Case(
        MISTRAL_3,
        "<s>",
        "</s>",
        "</s>",
        (*_S, "[INST]", "[/INST]"),
        system="the chat template leaves out a message of the system",
        pieces="first",
        adds_bos=True,
    ),
    "Gemma": Case(
        GEMMA,
        "<bos>",
        "<eos>",
        "<end_of_turn>",
        ("<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
        system=REFUSED + "System role not supported",
        pieces="first",
        adds_bos=True,
    ),
    "Phi 3": Case(
        PHI3,
        "<s>",
        "<|endoftext|>",
        "<|end|>",
        ("<unk>", "<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        pieces="every",
        strips=True,
    ),
    "DeepSeek": Case(
        DEEPSEEK,
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
        adds_bos=True,
    ),
    "Vicuna": Case(VICUNA, "<s>", "</s>", "</s>", _S, pieces="first", adds_bos=True),
}


def backend_of(case: Case) -> tokenizers.Tokenizer:
    """A tokenizer of some 350 entries that cuts as the checkpoint's does."""
    byte_level = case.pieces == "bytes"
    backend = tokenizers.Tokenizer(
        models.BPE(byte_fallback=not byte_level, unk_token=None if byte_level else "<unk>")
    )
    specials = list(case.specials)
    if byte_level:
        cut = pre_tokenizers.Split(tokenizers.Regex(case.pattern or _GPT2), "isolated")
        cover = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([cut, cover])
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        alphabet = sorted({*map(chr, range(33, 127)), "▁", "\n"})
        if case.pieces == "first":
            backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        else:
            backend.normalizer = normalizers.Sequence(
                [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
            )
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + len(specials) + 60,
        special_tokens=[
            AddedToken(name, special=True, normalized=False, rstrip=case.strips) for name in specials
        ],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    if case.adds_bos and case.bos is not None:
        pair = (case.bos, backend.token_to_id(case.bos))
        backend.post_processor = processors.TemplateProcessing(
            single=f"{case.bos} $A", pair=f"{case.bos} $A {case.bos} $B", special_tokens=[pair]
        )
    return backend


def write_checkpoint(folder: Path, case: Case) -> Path:
    """tokenizer.json and tokenizer_config.json of a checkpoint, without a model."""
    folder.mkdir(parents=True, exist_ok=True)
    backend_of(case).save(str(folder / "tokenizer.json"))
    config = {"bos_token": case.bos, "eos_token": case.eos, "chat_template": case.template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
