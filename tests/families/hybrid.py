"""Models of which some layers have a state instead of keys and values: it is kept, and holds no compression token."""

from __future__ import annotations

from .family import EITHER, EXPERTS, LINEAR_LAYERS, REFUSED, Family

_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 16}

HYBRID: dict[str, Family] = {
    "qwen3_next": Family(
        "Qwen3NextConfig",
        {**EXPERTS, "shared_expert_intermediate_size": 16, "head_dim": 8, **LINEAR_LAYERS},
        ccm=REFUSED,
        notes="linear layers",
    ),
    "qwen3_5_text": Family("Qwen3_5TextConfig", {"head_dim": 8, **LINEAR_LAYERS}, ccm=REFUSED, notes="linear layers"),
    "olmo_hybrid": Family("OlmoHybridConfig", {**LINEAR_LAYERS}, ccm=REFUSED, notes="linear layers"),
    "lfm2": Family("Lfm2Config", {"layer_types": ["conv", "full_attention"]}, ccm=REFUSED, notes="convolution layers"),
    "lfm2_moe": Family(
        "Lfm2MoeConfig",
        {**EXPERTS, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
        ccm=REFUSED,
        notes="convolution layers",
    ),
    "minimax": Family(
        "MiniMaxConfig",
        {"num_local_experts": 4, "block_size": 16, "layer_types": ["linear_attention", "full_attention"]},
        ccm=REFUSED,
        notes="linear layers, a cache class of its own",
        kvzip=REFUSED,
    ),
    "jamba": Family(
        "JambaConfig",
        {
            "num_experts": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
        ccm=REFUSED,
        continues=False,
        notes="Mamba layers",
        kvzip=EITHER,
    ),
    "bamba": Family(
        "BambaConfig", {**_MAMBA, "attn_layer_indices": [1]}, ccm=REFUSED, notes="Mamba layers", kvzip=EITHER
    ),
    "granitemoehybrid": Family(
        "GraniteMoeHybridConfig",
        {
            **_MAMBA,
            "num_local_experts": 4,
            "shared_intermediate_size": 16,
            "attention_multiplier": 0.25,
            "layer_types": ["mamba", "attention"],
        },
        ccm=REFUSED,
        notes="Mamba layers",
    ),
    "falcon_h1": Family(
        "FalconH1Config",
        {**_MAMBA, "mamba_d_ssm": 64},
        ccm=REFUSED,
        notes="attention and Mamba in every layer",
        kvzip=EITHER,
    ),
    "nemotron_h": Family(
        "NemotronHConfig",
        {
            "layers_block_type": ["mamba", "attention", "mlp"],
            "head_dim": 8,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 1,
            "chunk_size": 16,
            "moe_intermediate_size": 16,
            "moe_shared_expert_intermediate_size": 16,
        },
        ccm=REFUSED,
        notes="Mamba layers, layers without any cache",
        kvzip=EITHER,
    ),
    "zamba2": Family(
        "Zamba2Config",
        {
            "num_hidden_layers": 3,
            "layers_block_type": ["mamba", "hybrid", "mamba"],
            "num_key_value_heads": 4,
            "mamba_d_state": 8,
            "n_mamba_heads": 4,
            "chunk_size": 16,
            "adapter_rank": 8,
            "use_mamba_kernels": False,
        },
        ccm=REFUSED,
        notes="Mamba layers, shared attention block",
        kvzip=EITHER,
    ),
    "recurrent_gemma": Family(
        "RecurrentGemmaConfig",
        {"block_types": ["recurrent", "attention"], "attention_window_size": 16, "lru_width": 32},
        kvzip=REFUSED,
        ccm=REFUSED,
        continues=False,
        notes="recurrent and local layers only",
    ),
    "mamba": Family(
        "MambaConfig",
        {"state_size": 8, "time_step_rank": 4},
        kvzip=REFUSED,
        ccm=REFUSED,
        continues=False,
        notes="no attention",
        targets=("in_proj",),
    ),
    "mamba2": Family(
        "Mamba2Config",
        {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 16},
        kvzip=REFUSED,
        ccm=REFUSED,
        notes="no attention",
        gain=2.0,
        targets=("in_proj",),
    ),
    "falcon_mamba": Family(
        "FalconMambaConfig",
        {"state_size": 8, "time_step_rank": 4},
        kvzip=REFUSED,
        ccm=REFUSED,
        continues=False,
        notes="no attention",
        targets=("in_proj",),
    ),
}
