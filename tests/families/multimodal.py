"""Multimodal models, asked with a text prompt."""

from __future__ import annotations

from typing import Any

from .family import DECODER, EITHER, EXPERTS, LINEAR_LAYERS, MIXED, REFUSED, VOCABULARY, WINDOW, Family

_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
_IMAGE = {"image_size": 28, "patch_size": 14}
_IMAGE_TOKENS = {
    "image_token_id": 260,
    "video_token_id": 261,
    "vision_start_token_id": 262,
    "vision_end_token_id": 263,
}


def _text(**settings: Any) -> dict[str, Any]:
    return {**DECODER, **settings}


MULTIMODAL: dict[str, Family] = {
    "gemma3": Family(
        "Gemma3Config",
        {
            "text_config": _text(head_dim=8, query_pre_attn_scalar=8, **MIXED),
            "vision_config": {**_VISION, **_IMAGE},
            "mm_tokens_per_image": 4,
            "boi_token_index": 261,
            "eoi_token_index": 262,
            "image_token_index": 260,
        },
        bare=True,
        model_class="Gemma3ForConditionalGeneration",
        notes="ready masks from the wrapper, sliding layers",
    ),
    "gemma3n": Family(
        "Gemma3nConfig",
        {
            "text_config": _text(
                head_dim=8,
                num_hidden_layers=4,
                layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
                num_kv_shared_layers=2,
                hidden_size_per_layer_input=8,
                vocab_size_per_layer_input=VOCABULARY - 4,
                laurel_rank=8,
                activation_sparsity_pattern=[0.0] * 4,
                **WINDOW,
            ),
            "vision_config": {
                "architecture": "test_efficientnet",
                "model_args": None,
                "hidden_size": 32,
                "vocab_size": 2,
                "vocab_offset": VOCABULARY - 4,
            },
            "audio_config": {
                "hidden_size": 32,
                "vocab_size": 2,
                "vocab_offset": VOCABULARY - 2,
                "conf_num_hidden_layers": 1,
                "conf_num_attention_heads": 2,
                "sscp_conv_channel_size": [8, 4],
            },
            "boi_token_id": 261,
            "eoi_token_id": 262,
            "image_token_id": 260,
            "boa_token_id": 259,
            "eoa_token_id": 258,
            "audio_token_id": 263,
        },
        bare=True,
        model_class="Gemma3nForConditionalGeneration",
        notes="layers that share keys and values, sliding layers",
    ),
    "qwen2_5_vl": Family(
        "Qwen2_5_VLConfig",
        {
            "text_config": _text(
                rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
            ),
            "vision_config": {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2}
            | {"out_hidden_size": 32, "fullatt_block_indexes": [0]},
            **_IMAGE_TOKENS,
        },
        bare=True,
        model_class="Qwen2_5_VLForConditionalGeneration",
        notes="three positions a token",
    ),
    "qwen2_vl": Family(
        "Qwen2VLConfig",
        {
            "text_config": _text(
                rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
            ),
            "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2},
            **_IMAGE_TOKENS,
        },
        bare=True,
        model_class="Qwen2VLForConditionalGeneration",
        notes="three positions a token",
    ),
    "qwen3_vl": Family(
        "Qwen3VLConfig",
        {
            "text_config": _text(
                head_dim=8,
                rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
            ),
            "vision_config": {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2}
            | {"out_hidden_size": 32, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
            **_IMAGE_TOKENS,
        },
        bare=True,
        model_class="Qwen3VLForConditionalGeneration",
        notes="three positions a token",
    ),
    "qwen3_vl_moe": Family(
        "Qwen3VLMoeConfig",
        {
            "text_config": _text(
                head_dim=8,
                rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
                **EXPERTS,
            ),
            "vision_config": {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2}
            | {"out_hidden_size": 32, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
            **_IMAGE_TOKENS,
        },
        bare=True,
        model_class="Qwen3VLMoeForConditionalGeneration",
        notes="three positions a token",
    ),
    "qwen3_5": Family(
        "Qwen3_5Config",
        {
            "text_config": _text(
                head_dim=8,
                rope_parameters={
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "mrope_section": [1, 1, 2],
                    "partial_rotary_factor": 1.0,
                },
                **LINEAR_LAYERS,
            ),
            "vision_config": {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2}
            | {"out_hidden_size": 32, "num_position_embeddings": 16},
            **_IMAGE_TOKENS,
        },
        ccm=REFUSED,
        bare=True,
        model_class="Qwen3_5ForConditionalGeneration",
        notes="three positions a token, linear layers",
    ),
    "mistral3": Family(
        "Mistral3Config",
        {
            "text_config": {"model_type": "mistral", **_text(sliding_window=None, head_dim=8)},
            "vision_config": {"model_type": "pixtral", "head_dim": 16, **_VISION, **_IMAGE},
            "image_token_index": 260,
        },
        bare=True,
        model_class="Mistral3ForConditionalGeneration",
    ),
    "llava": Family(
        "LlavaConfig",
        {
            "text_config": {"model_type": "llama", **_text()},
            "vision_config": {"model_type": "clip_vision_model", "projection_dim": 32, **_VISION, **_IMAGE},
            "image_token_index": 260,
        },
        bare=True,
        model_class="LlavaForConditionalGeneration",
    ),
    "internvl": Family(
        "InternVLConfig",
        {
            "text_config": {"model_type": "qwen2", **_text()},
            "vision_config": {**_VISION, "image_size": [28, 28], "patch_size": [14, 14]},
            "image_token_id": 260,
        },
        bare=True,
        model_class="InternVLForConditionalGeneration",
    ),
    "smolvlm": Family(
        "SmolVLMConfig",
        {
            "text_config": {"model_type": "llama", **_text()},
            "vision_config": {**_VISION, **_IMAGE},
            "image_token_id": 260,
        },
        bare=True,
        model_class="SmolVLMForConditionalGeneration",
    ),
    "paligemma": Family(
        "PaliGemmaConfig",
        {
            "text_config": {"model_type": "gemma", **_text(head_dim=8)},
            "vision_config": {"model_type": "siglip_vision_model", "projection_dim": 32, **_VISION, **_IMAGE},
            "image_token_index": 260,
            "projection_dim": 32,
        },
        bare=True,
        continues=False,
        model_class="PaliGemmaForConditionalGeneration",
        notes="ready masks from the wrapper, prefix attends both ways",
        kvzip=EITHER,
        ccm=EITHER,
    ),
    "llama4": Family(
        "Llama4Config",
        {
            "text_config": _text(
                head_dim=8,
                num_local_experts=4,
                intermediate_size_mlp=64,
                no_rope_layers=[1, 0],
                attention_chunk_size=16,
                floor_scale=8,
                layer_types=["chunked_attention", "full_attention"],
            ),
            "vision_config": {**_VISION, **_IMAGE, "vision_output_dim": 32, "projector_input_dim": 32}
            | {"projector_output_dim": 32},
            "image_token_index": 260,
            "boi_token_index": 261,
            "eoi_token_index": 262,
        },
        bare=True,
        model_class="Llama4ForConditionalGeneration",
        notes="chunked layers",
        ccm=EITHER,
        broken=("5.24",),
    ),
}
