"""Mixtures of experts, and multi-head latent attention (most models with it are mixtures)."""

from __future__ import annotations

from .family import EITHER, EXPERTS, MIXED, VOCABULARY, Family

_ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}
_MLA = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
# not kv_b_proj: it reads the latents of all cached tokens, so no mask of the new ones fits it
_MLA_TARGETS = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj")

MIXTURES: dict[str, Family] = {
    # mixtures of experts
    "phimoe": Family("PhimoeConfig", {"num_local_experts": 4}),
    "qwen2_moe": Family("Qwen2MoeConfig", {**EXPERTS, "shared_expert_intermediate_size": 16}),
    "qwen3_moe": Family("Qwen3MoeConfig", EXPERTS),
    "mixtral": Family("MixtralConfig", {"num_local_experts": 4}),
    "olmoe": Family("OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2}),
    "flex_olmo": Family("FlexOlmoConfig", {"num_experts": 4, "num_experts_per_tok": 2}),
    "granitemoe": Family("GraniteMoeConfig", {"num_local_experts": 4, "attention_multiplier": 0.25}),
    "granitemoeshared": Family(
        "GraniteMoeSharedConfig",
        {"num_local_experts": 4, "attention_multiplier": 0.25, "shared_intermediate_size": 16},
    ),
    "glm4_moe": Family("Glm4MoeConfig", {**_ROUTED, "head_dim": 8}),
    "hunyuan_v1_moe": Family("HunYuanMoEV1Config", {"num_experts": 4, "moe_topk": 2, "head_dim": 8}),
    "ernie4_5_moe": Family(
        "Ernie4_5_MoeConfig", {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "head_dim": 8}
    ),
    "minimax_m2": Family("MiniMaxM2Config", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}),
    "llama4_text": Family(
        "Llama4TextConfig",
        {
            "head_dim": 8,
            "num_local_experts": 4,
            "intermediate_size_mlp": 64,
            "no_rope_layers": [1, 0],
            "attention_chunk_size": 16,
            "floor_scale": 8,
            "layer_types": ["chunked_attention", "full_attention"],
        },
        notes="chunked layers, queries scaled by position",
        ccm=EITHER,
    ),
    "gpt_oss": Family(
        "GptOssConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, **MIXED},
        notes="attention sinks, sliding layers",
    ),
    "dots1": Family("Dots1Config", {**_ROUTED, "n_shared_experts": 1, **MIXED}, notes="sliding layers"),
    "exaone_moe": Family("ExaoneMoeConfig", {**EXPERTS, **MIXED}, notes="sliding layers"),
    "afmoe": Family("AfmoeConfig", {**EXPERTS, "head_dim": 8, **MIXED}, notes="gated attention, sliding layers"),
    "dbrx": Family(
        "DbrxConfig",
        {
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 1024,
            "vocab_size": VOCABULARY,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        },
        bare=True,
        targets=("Wqkv", "out_proj"),
    ),
    "jetmoe": Family(
        "JetMoeConfig",
        {"num_local_experts": 4, "kv_channels": 8, "num_key_value_heads": 2, "num_attention_heads": 4},
        targets=("kv_proj",),
        notes="experts of attention: one query head a key head and expert",
        kvzip=EITHER,
    ),
    "mimo_v2_flash": Family(
        "MiMoV2FlashConfig",
        {**_ROUTED, "head_dim": 12, "v_head_dim": 8, **MIXED},
        notes="sinks, sliding layers, value width differs from key width",
    ),
    # multi-head latent attention: key and value widths differ
    "deepseek_v2": Family(
        "DeepseekV2Config",
        {**_MLA, **_ROUTED, "n_shared_experts": 1, "first_k_dense_replace": 1},
        targets=_MLA_TARGETS,
        notes="MLA",
    ),
    "deepseek_v3": Family(
        "DeepseekV3Config",
        {**_MLA, **_ROUTED, "n_shared_experts": 1, "first_k_dense_replace": 1},
        targets=_MLA_TARGETS,
        notes="MLA",
    ),
    "glm4_moe_lite": Family(
        "Glm4MoeLiteConfig", {**_MLA, **_ROUTED, "n_shared_experts": 1}, targets=_MLA_TARGETS, notes="MLA"
    ),
    "minicpm3": Family(
        "MiniCPM3Config",
        {**_MLA, "dim_model_base": 32, "scale_emb": 1},
        targets=_MLA_TARGETS,
        notes="MLA",
        gain=1.0,
    ),
    "youtu": Family(
        "YoutuConfig",
        {**_MLA, "embedding_initializer_range": 0.02},
        targets=_MLA_TARGETS,
        notes="MLA",
        gain=1.0,
    ),
    "longcat_flash": Family(
        "LongcatFlashConfig",
        {
            **_MLA,
            "num_layers": 1,
            "num_hidden_layers": 2,
            "ffn_hidden_size": 32,
            "expert_ffn_hidden_size": 16,
            "n_routed_experts": 4,
            "zero_expert_num": 2,
            "moe_topk": 2,
            "head_dim": 8,
        },
        targets=_MLA_TARGETS,
        notes="MLA, two attentions a layer",
    ),
}
