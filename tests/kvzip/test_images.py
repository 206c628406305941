"""Contexts that hold images.

Invariants: keeping everything, a question behind the cache is answered as by the model that is given the same images and ids;
scores and answers after eviction equal KVzip written out on a plain cache; other images give other answers; what cannot be
right is refused with the reason.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from hf_dataopt import KVzipCache, KVzipConfig
from hf_dataopt.errors import UnsupportedModelError
from hf_dataopt.kvzip.eviction import keep_mask
from hf_dataopt.kvzip.images import ContextImages, build_context
from hf_dataopt.kvzip.prefill import prefill
from hf_dataopt.kvzip.reading import read_context
from hf_dataopt.kvzip.scoring import score_context

from ..families import FAMILIES
from ..families.plain import cache_keyword, generate
from ..models import byte_tokenizer, held, tiny_model
from .exactness import furthest
from .oracle import masked_logits, written_out_scores
from .processors import gemma3_processor, llava_processor, picture, qwen3_vl_processor

PARTS = [
    {"type": "text", "text": "The plan: "},
    {"type": "image", "image": picture(0)},
    {"type": "text", "text": " and then "},
    {"type": "image", "image": picture(1)},
    {"type": "text", "text": " ends here."},
]
QUESTION = "Which one?"
CONFIG = KVzipConfig(chunk_size=13, replay="exact", overlap=5, keep_ratio=1.0)  # chunks end within images
TOLERANCE = 1e-4


class Seen:
    """One family with a context of two images: model, processor, prompt, and what the plain model is given beside ids."""

    def __init__(self, family: str, processor: Callable[[], Any], implementation: str = "sdpa") -> None:
        if not FAMILIES[family].available:
            pytest.skip(f"no {family} here")
        self.family, self.implementation, self.processor = family, implementation, processor()
        self.model = self.untouched()
        self.prompt, images = build_context(self.processor, PARTS, CONFIG)
        assert images is not None
        self.images: ContextImages = images

    def untouched(self) -> PreTrainedModel:
        family, changes = FAMILIES[self.family], {}
        if self.family == "gemma3":  # a layer more, which reads what image tokens saw of each other in a global one
            kinds = ["sliding_attention", "full_attention", "full_attention"]
            more = {"num_hidden_layers": 3, "layer_types": kinds}
            changes = {"text_config": {**family.settings["text_config"], **more}}
        model = family.model(**changes)
        model.set_attn_implementation(self.implementation)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name.endswith("mm_input_projection_weight"):  # zeros, so that all images would be alike
                    weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
        return model

    def cache(self, **settings: Any) -> KVzipCache:
        return KVzipCache.from_context(self.model, self.processor, PARTS, config=CONFIG, progress=False, **settings)

    def beside(self, length: int) -> dict[str, torch.Tensor]:
        """What the plain model is given beside so many ids; what goes by token is 0 for the question."""
        found = {}
        for name, value in self.images.inputs.items():
            if value.shape == self.prompt.ids[None].shape:
                value = torch.cat([value, value.new_zeros(1, length - value.shape[1])], dim=1)
            found[name] = value
        return found


@pytest.fixture(params=["gemma3", "gemma3-eager", "llava"])
def seen(request: pytest.FixtureRequest) -> Seen:
    if request.param == "llava":
        return Seen("llava", llava_processor)
    return Seen("gemma3", gemma3_processor, "eager" if "eager" in request.param else "sdpa")


def test_keeping_everything_is_the_plain_model(seen: Seen) -> None:
    plain, cache = seen.untouched(), seen.cache()
    inputs = cache.inputs(QUESTION)
    ids, n = inputs["input_ids"], cache.ids.shape[1]
    beside = seen.beside(ids.shape[1])
    with torch.no_grad():
        expected = plain(ids, **beside).logits[:, n:]
        blind = plain(ids).logits[:, n:]
        found = seen.model(ids[:, n:], **held(cache.fork())).logits
    assert furthest(found, expected) <= TOLERANCE and furthest(blind, expected) > 1e-2
    told, said = generate(plain, 4, input_ids=ids, **beside), generate(seen.model, 4, **inputs)
    assert torch.equal(said.sequences, told.sequences)
    assert furthest(torch.cat(said.logits), torch.cat(told.logits)) <= TOLERANCE
    with torch.no_grad():
        assert torch.equal(seen.model(ids, **beside).logits[:, n:], expected)


def test_batches_and_conversations(seen: Seen) -> None:
    plain, cache = seen.untouched(), seen.cache()
    questions = [QUESTION, "And if not?"]
    said = generate(seen.model, 4, **cache.inputs(questions))
    for row, question in enumerate(questions):  # alone: in windows, transformers counts padding as tokens
        ids = cache.inputs(question)["input_ids"]
        told = generate(plain, 4, input_ids=ids, **seen.beside(ids.shape[1]))
        assert torch.equal(said.sequences[row, -4:], told.sequences[0, -4:])
        assert furthest(torch.stack(said.logits, dim=1)[row], torch.cat(told.logits)) <= TOLERANCE
    if seen.family == "gemma3":  # LLaVA's template writes the images before the task line, where text alone has none
        talk = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "This."}]
        row = cache.inputs([*talk, {"role": "user", "content": "Why?"}])["input_ids"]
        assert seen.processor.tokenizer.decode(row[0]).endswith(
            f"{QUESTION}<eos>[assistant]This.<eos>[user]Why?<eos>[assistant]"
        )


def test_scores_and_eviction_equal_the_written_out_method(seen: Seen) -> None:
    plain, prompt = seen.untouched(), seen.prompt
    full = prefill(seen.model, prompt, CONFIG, images=seen.images, progress=False)
    scores = score_context(full, CONFIG, progress=False)
    given: list[torch.Tensor] = []
    decoder = plain.get_decoder()
    hook = decoder.register_forward_pre_hook(lambda *call: given.append(call[2]["inputs_embeds"][0]), with_kwargs=True)
    cache = DynamicCache(config=plain.config.get_text_config(decoder=True))
    with torch.no_grad():
        plain(prompt.ids[None], **seen.images.inputs, **{cache_keyword(plain): cache})
    hook.remove()
    placeholder = plain.config.image_token_id
    pictures = given[0][prompt.ids == placeholder]
    places = {int(at): index for index, at in enumerate((prompt.context_ids == placeholder).nonzero())}

    def embed(ids: torch.Tensor) -> torch.Tensor:
        """As the repeat inputs come one after the other: each ends with the next chunk, and may begin with some before it."""
        chunk = next(chunks)
        found = decoder.get_input_embeddings()(ids).clone()
        overlap = len(prompt.next_repeat_ids)
        for at in range(len(ids)):
            if ids[at] == placeholder:
                behind = at >= len(ids) - (chunk[1] - chunk[0])
                token = chunk[1] - (len(ids) - at) if behind else chunk[0] - CONFIG.overlap + at - overlap
                found[at] = pictures[places[token]]
        return found

    chunks = iter([(start, end) for start, end, _ in prompt.repeat_inputs(CONFIG.chunk_size, CONFIG.overlap)])
    expected = written_out_scores(plain, cache, prompt, CONFIG, full.scored_layers, embed)
    assert furthest(scores, expected) <= TOLERANCE
    config = KVzipConfig(keep_ratio=0.3)
    keep = keep_mask(scores, config, full.n_prefix)
    prefix = keep.new_ones(keep.shape[1], full.n_prefix)
    kept = {index: torch.cat([prefix, row], dim=1) for index, row in zip(full.scored_layers, keep, strict=True)}
    compressed = KVzipCache.from_scores(full, scores, config, tokenizer=seen.processor)
    question = compressed.inputs(QUESTION)["input_ids"][0, prompt.ids.numel() :]
    with torch.no_grad():
        found = seen.model(question[None], **held(compressed.fork())).logits[0]
    assert furthest(found, masked_logits(plain, cache, question, kept)) <= TOLERANCE


def test_other_images_give_other_answers_and_saving_keeps_them(seen: Seen, tmp_path: Path) -> None:
    cache = seen.cache(keep_ratio=0.5)
    inputs = cache.inputs(QUESTION)
    once = torch.cat(generate(seen.model, 4, **inputs).logits)
    cache.save_pretrained(tmp_path)
    assert b"pixel" not in b"".join(file.read_bytes() for file in tmp_path.iterdir())
    again = KVzipCache.from_pretrained(tmp_path, seen.model, seen.processor)
    assert torch.equal(again.ids, cache.ids) and torch.equal(again.inputs(QUESTION)["input_ids"], inputs["input_ids"])
    assert furthest(torch.cat(generate(seen.model, 4, **again.inputs(QUESTION)).logits), once) == 0
    others = [{"type": "image", "image": picture(7)} if part["type"] == "image" else part for part in PARTS]
    message = {"role": "user", "content": others}
    other = KVzipCache.from_context(seen.model, seen.processor, message, 0.5, config=CONFIG, progress=False)
    assert torch.equal(other.ids, cache.ids)
    assert furthest(torch.cat(generate(seen.model, 4, **other.inputs(QUESTION)).logits), once) > 1e-2


def test_text_with_a_processor_is_text_with_its_tokenizer(seen: Seen) -> None:
    tokenizer = seen.processor.tokenizer
    for text in (
        "Nobody has the key.",
        [{"type": "text", "text": "Nobody has "}, {"type": "text", "text": "the key."}],
    ):
        prompt, images = build_context(seen.processor, {"role": "user", "content": text}, CONFIG)
        assert images is None and tokenizer.decode(prompt.context_ids) == "Nobody has the key."
        assert tokenizer.decode(prompt.prefix_ids).startswith("<bos>[user]Given the context")
        assert tokenizer.decode(prompt.suffix_ids) == "<eos>[assistant]"
    cache = KVzipCache.from_context(seen.model, seen.processor, "Nobody has the key.", 1.0, progress=False)
    ids = cache.inputs("Who?")["input_ids"]
    with torch.no_grad():
        expected = seen.untouched()(ids).logits[:, cache.ids.shape[1] :]
        found = seen.model(ids[:, cache.ids.shape[1] :], **held(cache)).logits
    assert furthest(found, expected) <= TOLERANCE


def test_threads_read_their_own_images() -> None:
    seen = Seen("gemma3", gemma3_processor)
    contexts = [[*PARTS[:1], {"type": "image", "image": picture(index)}] for index in range(4)]

    def scores(context: Any) -> torch.Tensor:
        prompt, images = build_context(seen.processor, context, CONFIG)
        return score_context(prefill(seen.model, prompt, CONFIG, images=images, progress=False), CONFIG, progress=False)

    alone = [scores(context) for context in contexts]
    found: dict[int, torch.Tensor] = {}
    threads = [
        threading.Thread(target=lambda index=index: found.update({index: scores(contexts[index])}))
        for index in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[index], alone[index]) for index in range(4))
    assert not torch.equal(alone[0], alone[1])


def test_positions_in_three_parts_are_refused() -> None:
    seen = Seen("qwen3_vl", qwen3_vl_processor)
    with pytest.raises(UnsupportedModelError, match="Qwen3VLForConditionalGeneration: it does not count positions"):
        seen.cache()
    ids = torch.randint(4, 250, (1, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(seen.model(ids).logits, seen.untouched()(ids).logits)
    cache = KVzipCache.from_context(seen.model, seen.processor, "Nobody has the key.", 1.0, progress=False)
    assert cache.inputs("Who?")["input_ids"].shape[0] == 1


def test_models_that_see_no_images_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="reads ids, so no images"):
        KVzipCache.from_context(tiny_model("llama"), gemma3_processor(), PARTS, 0.5, progress=False)


@pytest.mark.parametrize(
    ("context", "words"),
    [
        ([{"type": "image"}], "needs one of image, url"),
        ([*PARTS, {"type": "video", "video": "a.mp4"}], "'video' cannot be read"),
        ([*PARTS, {"type": "text", "text": "<eos>"}], "names a special token"),
        ([*PARTS, {"type": "text", "text": "<start_of_image>"}], "names a special token"),
    ],
)
def test_bad_contexts(context: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build_context(gemma3_processor(), context, CONFIG)


def test_images_need_a_processor_and_a_template_for_them() -> None:
    with pytest.raises(ValueError, match="need the model's processor, got T"):
        build_context(byte_tokenizer(), PARTS, CONFIG)
    processor = gemma3_processor()
    with pytest.raises(ValueError, match="3 image tokens '<start_of_image>' into the context for 2"):
        counted = KVzipConfig(special_tokens_in_text=True)
        build_context(processor, [*PARTS, {"type": "text", "text": "<start_of_image>"}], counted)
    processor.chat_template = "{% for m in messages %}{{ m['role'] }}{% endfor %}"
    with pytest.raises(ValueError, match="leaves a text"):
        build_context(processor, PARTS, CONFIG)
    processor.chat_template = None
    with pytest.raises(ValueError, match="need a chat template"):
        build_context(processor, PARTS, CONFIG)


def test_questions_hold_text_only(seen: Seen) -> None:
    with pytest.raises(ValueError, match="'image' cannot be read here"):
        seen.cache().inputs(PARTS)


def test_what_stands_around_images() -> None:
    processor = gemma3_processor()
    config = KVzipConfig(system="Be <eos> brief.", task_line="Look: ")
    prompt, images = build_context(processor, PARTS[1:2], config)
    decode = processor.tokenizer.decode
    assert (
        decode(prompt.prefix_ids) == "<bos>[system]Be <eos> brief.<eos>[user]Look: "
        and int((prompt.prefix_ids < 4).sum()) == 2
    )
    picture_text = "<start_of_image>" + "<image_soft_token>" * 4 + "<end_of_image>"
    assert decode(prompt.context_ids) == f"\n\n{picture_text}\n\n"
    assert images is not None and images.inputs["token_type_ids"].shape == (1, prompt.ids.numel())
    assert torch.equal(images.inputs["token_type_ids"][0] == 1, prompt.ids == processor.tokenizer.image_token_id)
    whole = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "text", "text": "Look: "}, *PARTS[1:2]]}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    plain, images = build_context(processor, PARTS[1:2], KVzipConfig(task_line="Look:"))
    assert torch.equal(torch.cat([plain.ids, plain.suffix_ids]), whole["input_ids"][0])
    assert images is not None and torch.equal(images.inputs["pixel_values"], whole["pixel_values"])


def test_more_than_embeddings_is_refused() -> None:
    family = FAMILIES["gemma3n"]  # every decoder layer looks the ids up once more
    if not family.available:
        pytest.skip("no gemma3n here")
    prompt = build_context(byte_tokenizer(), "Nobody has the key.", CONFIG)[0]
    with pytest.raises(UnsupportedModelError, match="decoder reads per_layer_inputs, which scoring cannot repeat"):
        read_context(family.model(), prompt, CONFIG, images=ContextImages({}))
