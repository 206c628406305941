"""Llama, and what differs from it in norms, biases, activations, scales, positions or windows."""

from __future__ import annotations

from .family import EITHER, MIXED, REFUSED, VOCABULARY, WINDOW, Family

DENSE: dict[str, Family] = {
    "llama": Family("LlamaConfig"),
    "llama_mha": Family("LlamaConfig", {"num_key_value_heads": 4}, notes="one query head a key head"),
    "llama_mqa": Family("LlamaConfig", {"num_key_value_heads": 1}, notes="one key head"),
    "llama_linear": Family(
        "LlamaConfig", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}
    ),
    "llama_dynamic": Family(
        "LlamaConfig", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}}
    ),
    "llama_yarn": Family(
        "LlamaConfig",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 256,
            }
        },
        notes="scales attention through RoPE",
    ),
    "llama_llama3": Family(
        "LlamaConfig",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 256,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            }
        },
    ),
    "mistral": Family("MistralConfig", {"sliding_window": None}),
    "mistral_sliding": Family("MistralConfig", WINDOW, kvzip=REFUSED, notes="no layer attends globally"),
    "ministral": Family("MinistralConfig", {"head_dim": 8, **MIXED}, notes="sliding layers"),
    "ministral3": Family(
        "Ministral3Config",
        {
            "head_dim": 8,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "llama_4_scaling_beta": 0.1,
            },
        },
        notes="queries scaled by position",
    ),
    "qwen2": Family("Qwen2Config"),
    "qwen2_sliding": Family("Qwen2Config", {"use_sliding_window": True, **MIXED}, notes="sliding layers"),
    "qwen3": Family("Qwen3Config", {"head_dim": 8}),
    "phi": Family("PhiConfig", {"partial_rotary_factor": 0.5}, targets=("q_proj", "k_proj", "v_proj", "dense")),
    "phi3": Family("Phi3Config", targets=("qkv_proj", "o_proj")),
    "phi3_longrope": Family(
        "Phi3Config",
        {
            "original_max_position_embeddings": 512,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0, 1.1, 1.2, 1.3],
                "long_factor": [2.0, 3.0, 4.0, 5.0],
                "original_max_position_embeddings": 512,
            },
        },
        targets=("qkv_proj", "o_proj"),
        notes="two sets of frequencies, by length",
    ),
    "gemma": Family("GemmaConfig", {"head_dim": 8}),
    "gemma2": Family(
        "Gemma2Config",
        {"head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0, **MIXED},
        notes="softcap, sliding layers",
    ),
    "gemma3_text": Family(
        "Gemma3TextConfig", {"head_dim": 8, "query_pre_attn_scalar": 8, **MIXED}, notes="sliding layers"
    ),
    "gemma3n_text": Family(
        "Gemma3nTextConfig",
        {
            "head_dim": 8,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCABULARY,
            "laurel_rank": 8,
            "activation_sparsity_pattern": [0.0] * 4,
            **WINDOW,
        },
        notes="layers that share keys and values, sliding layers",
    ),
    "gemma4_text": Family(
        "Gemma4TextConfig",
        {
            "head_dim": 8,
            "global_head_dim": 8,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCABULARY,
            **MIXED,
        },
        notes="sliding layers",
    ),
    "gemma4_text_shared": Family(
        "Gemma4TextConfig",
        {
            "head_dim": 8,
            "global_head_dim": 16,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCABULARY,
            **WINDOW,
        },
        notes="layers that share keys and values, two head sizes, sliding layers",
        ccm=EITHER,
    ),
    "vaultgemma": Family(
        "VaultGemmaConfig",
        {"head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0, **MIXED},
        notes="softcap, sliding layers",
    ),
    "cohere": Family("CohereConfig", {"logit_scale": 1.0}),
    "cohere2": Family("Cohere2Config", {"logit_scale": 1.0, **MIXED}, notes="sliding layers, no RoPE on full ones"),
    "olmo": Family("OlmoConfig"),
    "olmo2": Family("Olmo2Config"),
    "olmo3": Family("Olmo3Config", MIXED, notes="sliding layers"),
    "granite": Family("GraniteConfig", {"attention_multiplier": 0.25}, notes="own logit scale"),
    "smollm3": Family("SmolLM3Config", {"no_rope_layers": [1, 0]}, notes="a layer without RoPE"),
    "glm": Family("GlmConfig", {"head_dim": 8}),
    "glm4": Family("Glm4Config", {"head_dim": 8}),
    "starcoder2": Family("Starcoder2Config", {"sliding_window": None}),
    "stablelm": Family("StableLmConfig", {"partial_rotary_factor": 0.5}),
    "nemotron": Family("NemotronConfig"),
    "exaone4": Family("Exaone4Config", MIXED, notes="sliding layers, no RoPE on full ones"),
    "hunyuan_v1_dense": Family("HunYuanDenseV1Config", {"head_dim": 8}),
    "ernie4_5": Family("Ernie4_5Config", {"head_dim": 8}),
    "seed_oss": Family("SeedOssConfig", {"head_dim": 8}),
    "bitnet": Family("BitNetConfig"),
    "apertus": Family("ApertusConfig"),
    "arcee": Family("ArceeConfig"),
    "helium": Family("HeliumConfig", {"head_dim": 8}),
    "nanochat": Family("NanoChatConfig"),
    "cwm": Family("CwmConfig", {"head_dim": 8, **MIXED}, notes="sliding layers"),
    "diffllama": Family("DiffLlamaConfig", kvzip=EITHER, ccm=EITHER, notes="difference of two attentions, own code"),
    "persimmon": Family("PersimmonConfig", {"num_key_value_heads": 4}, targets=("query_key_value", "dense")),
    "doge": Family("DogeConfig", kvzip=EITHER, ccm=EITHER, notes="a mask that depends on the values", continues=False),
    "modernbert_decoder": Family(
        "ModernBertDecoderConfig",
        {"local_attention": 16, "layer_types": ["sliding_attention", "full_attention"], "num_key_value_heads": 4},
        targets=("q_proj", "k_proj", "v_proj", "Wo"),
        notes="sliding layers, `get_decoder` is the head",
    ),
}
