"""KVzip as a generation method of transformers: `model.generate(custom_generate=..., context=..., question=...)`."""

from __future__ import annotations

from typing import Any

from hf_dataopt import KVzipCache, KVzipConfig, KVzipGates


def generate(
    model: Any,
    inputs: Any = None,
    *,
    context: str | KVzipCache | None = None,
    question: Any = None,
    tokenizer: Any = None,
    keep_ratio: float | None = None,
    kvzip_config: KVzipConfig | None = None,
    gates: KVzipGates | str | None = None,
    **arguments: Any,
) -> Any:
    """Answer questions about a context from its compressed key-value cache.

    Args:
        model: a causal language model.
        inputs: must be left out, as `input_ids`: the prompt is made of context and question.
        context: a text, compressed now; or a `KVzipCache` of this model, compressed before and used as it is.
        question: what `KVzipCache.inputs` takes: a text, a conversation, or a list of texts (a batch).
        tokenizer: of the model; not needed with a cache that has one.
        keep_ratio: share of the context's pairs that stays, default 0.3.
        kvzip_config: all other settings.
        gates: learned gates, or the folder or Hub name of some, that score while the context is read.
        arguments: what `generate` takes.

    Returns:
        What `generate` returns: ids of prompt and answer, (B, n).

    Raises:
        ValueError, TypeError: no context, no question, ids beside them, or settings beside a cache that is compressed already.
    """
    if inputs is not None or arguments.get("input_ids") is not None:
        raise ValueError("KVzip makes the prompt of context= and question=; leave inputs and input_ids out")
    if context is None or question is None:
        raise ValueError(
            "give context= (a text or a KVzipCache) and question= (a text, a conversation or a list of texts)"
        )
    if isinstance(context, KVzipCache):
        if keep_ratio is not None or kvzip_config is not None or gates is not None:
            raise ValueError("this context is compressed already; keep_ratio, kvzip_config and gates come too late")
        cache = context
    elif tokenizer is None:
        raise ValueError("give tokenizer=: context and question are texts")
    else:
        learned = KVzipGates.from_pretrained(gates) if isinstance(gates, str) else gates
        cache = KVzipCache.from_context(model, tokenizer, context, keep_ratio, config=kvzip_config, gates=learned)
    given = {name: value for name, value in arguments.items() if value is not None}
    if tokenizer is not None:
        given["tokenizer"] = tokenizer  # for stop strings
    # the class's own: a model loaded with this repository has the function above as `model.generate`
    return type(model).generate(model, **cache.inputs(question), **given)
