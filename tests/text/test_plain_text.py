"""Special tokens that a user writes are text.

Whatever the tokenizer: no special id comes out of a text, the text comes back on decoding, and where no special token is
named the ids are the tokenizer's own. Special tokens that a template writes around hidden text stay special.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_dataopt.text.plain_text import encode, hide

from ..models import byte_tokenizer

END, THINK = "<|im_end|>", "<think>"


def byte_level() -> Any:
    """One token per byte; one special token more, and one added token that is not special."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(END, special=True), AddedToken(THINK, special=False)])
    return tokenizer


def lowercasing() -> Any:
    """Special tokens are matched in the normalised text: `<EOS>` is one too."""
    backend = Tokenizer(models.BPE(vocab={chr(code): code - 32 for code in range(32, 127)}, merges=[]))
    backend.normalizer = normalizers.Lowercase()
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    end = AddedToken("<eos>", normalized=True, special=True)
    tokenizer.add_special_tokens({"eos_token": end})
    return tokenizer


def pieces() -> Any:
    """Unigram with a prefix space; its special tokens are pieces of the vocabulary, better than all others."""
    signs = "".join(chr(code) for code in range(33, 127))
    scores = [("<unk>", -50.0), ("</s>", 0.0), ("\u2581", -2.0), *((sign, -3.0) for sign in signs)]
    backend = Tokenizer(models.Unigram(scores, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def merging() -> Any:
    """BPE whose merges build the special token."""
    signs = [chr(code) for code in range(32, 127)]
    vocab = {sign: index for index, sign in enumerate(signs)} | {"e>": 95, "<e>": 96, "<e": 97}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("e", ">"), ("<", "e>"), ("<", "e")]))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>")


TOKENIZERS = {make.__name__: make() for make in (byte_level, lowercasing, pieces, merging)}
NAMES = {name: [t.content for t in one.added_tokens_decoder.values() if t.special] for name, one in TOKENIZERS.items()}


def texts(name: str) -> st.SearchStrategy[str]:
    signs = st.text(st.characters(codec="utf-8" if name == "byte_level" else "ascii", min_codepoint=33), max_size=6)
    named = st.sampled_from([*NAMES[name], *(one.upper() for one in NAMES[name]), THINK, " ", "<", "|>", "e>", "</s"])
    return st.lists(signs | named, max_size=8).map("".join)


def own(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("name", list(TOKENIZERS))
def test_no_special_id_comes_out_of_a_text(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}

    @settings(max_examples=150, deadline=None)
    @given(texts(name))
    def check(text: str) -> None:
        ids = encode(tokenizer, hide(tokenizer, text))
        unknown = {tokenizer.unk_token_id} if "\x7f" in text else set()
        assert not special & set(ids) - unknown
        if not unknown:
            spelled, back = (text.lower() if name == "lowercasing" else text), tokenizer.decode(ids)
            gone = " " if name == "pieces" else ""  # its prefix space eats one at the start
            assert back.replace(gone, "") == spelled.replace(gone, "") if gone else back == spelled
        if not special & set(own(tokenizer, text)):
            assert ids == own(tokenizer, text)
        if name != "lowercasing" or "<EOS>" not in text:
            assert encode(tokenizer, text) == own(tokenizer, text)  # not hidden: as the tokenizer has it

    check()


@pytest.mark.parametrize("name", list(TOKENIZERS))
def test_a_template_s_tokens_stay_special_around_a_text(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    end = NAMES[name][-1]

    @settings(max_examples=100, deadline=None)
    @given(texts(name), texts(name))
    def check(first: str, second: str) -> None:
        written = f"{end}A{hide(tokenizer, first)}B{end}{hide(tokenizer, second)}{end}"
        ids = encode(tokenizer, written)
        assert ids.count(tokenizer.convert_tokens_to_ids(end)) == 3
        harmless = f"{end}A{first}B{end}{second}{end}"
        if own(tokenizer, harmless).count(tokenizer.convert_tokens_to_ids(end)) == 3 and not any(
            one in first + second for one in NAMES[name]
        ):
            assert ids == own(tokenizer, harmless)

    check()


def test_tokens_around_a_sequence_stay() -> None:
    from tokenizers import processors

    tokenizer = byte_level()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    for text in ("plain", f"a<eos>b{END}", "<bos>"):
        hidden = encode(tokenizer, hide(tokenizer, text), add_special_tokens=True)
        assert (hidden[0], hidden[-1]) == (1, 2) and hidden[1:-1] == encode(tokenizer, hide(tokenizer, text))
    assert encode(tokenizer, "plain", add_special_tokens=True) == tokenizer("plain")["input_ids"]


def test_the_tokenizer_is_left_alone() -> None:
    tokenizer = byte_level()
    before = tokenizer.backend_tokenizer.to_str()
    encode(tokenizer, hide(tokenizer, f"a<eos>b{END}"))
    assert tokenizer.backend_tokenizer.to_str() == before and not tokenizer.backend_tokenizer.encode_special_tokens
    assert own(tokenizer, "<eos>") == [2]


def test_special_tokens_that_come_later_are_known() -> None:
    tokenizer = byte_tokenizer()
    assert encode(tokenizer, hide(tokenizer, END)) == own(tokenizer, END)
    tokenizer.add_tokens([AddedToken(END, special=True)])
    assert own(tokenizer, END) == [260]
    assert 260 not in encode(tokenizer, hide(tokenizer, END))
    tokenizer.pad_token = "d"  # a sign of its own is text, whatever it is also used for
    assert encode(tokenizer, hide(tokenizer, "and")) == own(tokenizer, "and")


def test_what_cannot_be_text_is_refused() -> None:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "hi": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    assert encode(tokenizer, hide(tokenizer, "hi you hi")) == [2, 0, 2]  # an unknown word is unknown as ever
    for name in ("</s>", "<unk>"):
        with pytest.raises(ValueError, match=f"'{name}'.*special_tokens_in_text=True"):
            encode(tokenizer, hide(tokenizer, f"hi you {name}"))
    with pytest.raises(ValueError, match="role"):
        hide(tokenizer, [{"role": "user</s>", "content": "hi"}])


def test_lists_and_dicts_are_walked() -> None:
    tokenizer = byte_tokenizer()
    given_ = [{"role": "user", "content": "a<eos>", "n": 3, "parts": ["<bos>", {"<eos>": None}]}]
    hidden = hide(tokenizer, given_)
    assert "<eos>" not in hidden[0]["content"] and "<bos>" not in hidden[0]["parts"][0]
    assert hidden[0]["role"] == "user" and hidden[0]["n"] == 3
    assert "<eos>" not in str(hidden)  # nor in keys: templates print them
    assert list(hidden[0]["parts"][1].values()) == [None]
    assert given_[0]["content"] == "a<eos>"


class Words:
    """A slow tokenizer: words by trie, no backend."""

    def __new__(cls) -> Any:
        from transformers.tokenization_python import PreTrainedTokenizer

        class Signs(PreTrainedTokenizer):
            vocab_size = 128

            def get_vocab(self) -> dict[str, int]:
                return {chr(code): code for code in range(128)} | self._added_tokens_encoder

            def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
                return list(text)

            def _convert_token_to_id(self, token: str) -> int:
                return ord(token)

            def _convert_id_to_token(self, index: int) -> str:
                return chr(index)

        return Signs(eos_token="</s>", pad_token="<pad>")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["</s>", "<pad>", THINK, "a", " ", "<", "/s>"]), max_size=8).map("".join))
def test_a_slow_tokenizer(text: str) -> None:
    tokenizer = Words()
    tokenizer.add_tokens([THINK])
    special = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    ids = encode(tokenizer, hide(tokenizer, text))
    assert not special & set(ids)
    assert tokenizer.decode(ids, spaces_between_special_tokens=False).replace(" ", "") == text.replace(" ", "")
    around = encode(tokenizer, f"</s>{hide(tokenizer, text)}</s>")
    assert around == [tokenizer.eos_token_id, *ids, tokenizer.eos_token_id]
