"""Tiny random models of the five families, and a tokenizer, all made offline."""

from __future__ import annotations

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_dataopt._compat import cache_keyword

_SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
_DECODER = {
    "vocab_size": 264,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    **_SIZES,
}
FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        },
    ),
}


def tiny_model(family: str, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A random model of one family; weights are scaled up so that attention is not flat and outputs differ."""
    config_class, extra = FAMILIES[family]
    config = getattr(transformers, config_class)(**{**_DECODER, **extra, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "embed" not in name:
                weight.mul_(6)
    return model.eval()


def byte_tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """One token per byte (id = byte + 4), with a small chat template."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    order = sorted(alphabet)
    vocab = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<unk>": 3} | {token: index + 4 for index, token in enumerate(order)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    from tokenizers import decoders

    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    if chat:
        wrapped.chat_template = (
            "<bos>{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<eos>{% endfor %}"
            "{% if add_generation_prompt %}[assistant]{% endif %}"
        )
    return wrapped


def held(cache: object) -> dict[str, object]:
    """A cache as the keyword argument that the installed transformers wants."""
    return {cache_keyword(): cache}
