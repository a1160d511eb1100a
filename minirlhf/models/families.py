"""The model families: what each one's directories look like, by the `model_type` of config.json.

To add a family, write its page (one file, as gpt2.py) and enter it here; nothing else has to know.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from minirlhf.models import gpt2, gpt_neo, llama, llama_config, neox
from minirlhf.models.interface import LanguageModel


class Family(NamedTuple):
    """How one model type is read and written.

    from_huggingface, to_huggingface: config.json <-> the page's config; what is not supported is refused.
    language_classes: transformers' names of it as a language model; the first is the one we write.
    scalar_class: its name as a reward model.
    prefix: what transformers puts before the backbone's names; files without it are read too.
    embedding: the token embedding, which a tied head in a file must repeat.
    head: the unembedding's tensor in a file of transformers; stands outside the prefix.
    ignored: buffers of old files that hold no parameters.
    outputs_first: whether linear weights are stored [out, in] (else [in, out]).
    """

    config: type
    from_huggingface: Callable[[Mapping[str, Any]], Any]
    to_huggingface: Callable[[Any], dict[str, Any]]
    bind: Callable[[Any], LanguageModel]
    language_classes: tuple[str, ...]
    scalar_class: str
    prefix: str
    embedding: str
    head: str
    ignored: re.Pattern[str]
    outputs_first: bool = True


def _llama(name: str) -> Family:
    """One of the model types of models/llama.py, by what its classes' names begin with."""
    return Family(
        config=llama_config.LlamaConfig,
        from_huggingface=llama_config.from_huggingface,
        to_huggingface=llama_config.to_huggingface,
        bind=llama.bind,
        language_classes=(f"{name}ForCausalLM", f"{name}Model"),
        scalar_class=f"{name}ForSequenceClassification",
        prefix="model.",
        embedding="embed_tokens.weight",
        head="lm_head.weight",
        ignored=re.compile(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq"),
    )


FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        config=gpt2.GPT2Config,
        from_huggingface=gpt2.from_huggingface,
        to_huggingface=gpt2.to_huggingface,
        bind=gpt2.bind,
        language_classes=("GPT2LMHeadModel", "GPT2Model"),
        scalar_class="GPT2ForSequenceClassification",
        prefix="transformer.",
        embedding="wte.weight",
        head="lm_head.weight",
        ignored=re.compile(r"h\.\d+\.attn\.(masked_)?bias"),
        outputs_first=False,
    ),
    "llama": _llama("Llama"),
    "mistral": _llama("Mistral"),
    "qwen2": _llama("Qwen2"),
    "gpt_neox": Family(
        config=neox.GPTNeoXConfig,
        from_huggingface=neox.from_huggingface,
        to_huggingface=neox.to_huggingface,
        bind=neox.bind,
        language_classes=("GPTNeoXForCausalLM", "GPTNeoXModel"),
        scalar_class="GPTNeoXForSequenceClassification",
        prefix="gpt_neox.",
        embedding="embed_in.weight",
        head="embed_out.weight",
        ignored=re.compile(r"layers\.\d+\.attention\.((masked_)?bias|rotary_emb\.inv_freq)"),
    ),
    "gpt_neo": Family(
        config=gpt_neo.GPTNeoConfig,
        from_huggingface=gpt_neo.from_huggingface,
        to_huggingface=gpt_neo.to_huggingface,
        bind=gpt_neo.bind,
        language_classes=("GPTNeoForCausalLM", "GPTNeoModel"),
        scalar_class="GPTNeoForSequenceClassification",
        prefix="transformer.",
        embedding="wte.weight",
        head="lm_head.weight",
        ignored=re.compile(r"h\.\d+\.attn\.attention\.(masked_)?bias"),
    ),
}
"""Every model type that we read and write."""


def family_of(model: LanguageModel) -> Family:
    """The entry that a bound model belongs to."""
    page = next(family for family in FAMILIES.values() if isinstance(model.config, family.config))
    return FAMILIES[page.to_huggingface(model.config)["model_type"]]


def with_stop_ids(model: LanguageModel, stop_ids: tuple[int, ...]) -> LanguageModel:
    """The same model, whose responses end with other tokens; the first of them is its EOS."""
    config = dataclasses.replace(model.config, eos_token_id=stop_ids[0])
    return family_of(model).bind(config)._replace(stop_ids=stop_ids)
