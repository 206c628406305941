"""Tiny random models of many decoder-only families, to show which ones a method handles exactly and which it refuses.

Every model is seeded, has two layers (more where a pattern of layers needs it) and a vocabulary of 264 tokens, so that
`byte_tokenizer` fits. Weights are scaled up as in `models.py`: attention is not flat, and a lost key changes the logits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCABULARY = 264
_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # dropout is off in eval() anyway; `get_peft_model` would put it on
    "attention_dropout": 0.0,
}
_WINDOW = {"sliding_window": 16}
_MIXED = {"layer_types": ["sliding_attention", "full_attention"], **_WINDOW}
_LINEAR_LAYERS = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_MLA = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 16}
_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
_IMAGE = {"image_size": 28, "patch_size": 14}
_IMAGE_TOKENS = {
    "image_token_id": 260,
    "video_token_id": 261,
    "vision_start_token_id": 262,
    "vision_end_token_id": 263,
}

EXACT, REFUSED = "exact", "refused"


@dataclass(frozen=True)
class Family:
    """One kind of model.

    Args:
        config_class: name of the transformers class of its configuration.
        settings: of the configuration, on top of the common ones.
        kvzip, ccm: `"exact"`: the method must be exact on it; `"refused"`: it must raise `UnsupportedModelError`.
        notes: what is special about its attention or its layers.
        model_class: name of the transformers class of the model, where `AutoModelForCausalLM` picks another one.
        gain: factor on the weights; less where random weights overflow.
        bare: leave the common settings out (multimodal models, whose `settings` hold those of their parts).
        targets: what a CCM adapter adapts; None for the usual four projections.
    """

    config_class: str
    settings: dict[str, Any] = field(default_factory=dict)
    kvzip: str = EXACT
    ccm: str = EXACT
    notes: str = ""
    model_class: str | None = None
    gain: float = 6.0
    bare: bool = False
    targets: Any = None

    @property
    def available(self) -> bool:
        """Whether the installed transformers has it."""
        return hasattr(transformers, self.config_class) and hasattr(transformers, self.model_class or "PreTrainedModel")

    def model(self, seed: int = 0, **changes: Any) -> PreTrainedModel:
        """A random model in eval mode; the routed experts of mixtures run one by one, which is exact for any batch."""
        common = {} if self.bare else _DECODER
        config = getattr(transformers, self.config_class)(**{**common, **self.settings, **changes})
        text = config.get_text_config(decoder=True)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            if self.model_class is None:
                model = transformers.AutoModelForCausalLM.from_config(config)
            else:
                model = getattr(transformers, self.model_class)(config)
        if getattr(text, "_experts_implementation", None):
            model.set_experts_implementation("eager")
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name.endswith("sinks"):  # flat zeros would hide a forgotten sink
                    weight.copy_(torch.randn(weight.shape, generator=generator))
                elif weight.ndim >= 2 and "embed" not in name and "vision" not in name and "conv" not in name:
                    weight.mul_(self.gain)
        return model.eval()


def _text(**settings: Any) -> dict[str, Any]:
    return {**_DECODER, **settings}


FAMILIES: dict[str, Family] = {
    # Llama and what differs from it in norms, biases, activations or scales
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
    "mistral_sliding": Family("MistralConfig", _WINDOW, kvzip=REFUSED, notes="no layer attends globally"),
    "ministral": Family("MinistralConfig", {"head_dim": 8, **_MIXED}, notes="sliding layers"),
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
    "qwen2_sliding": Family(
        "Qwen2Config", {"use_sliding_window": True, "max_window_layers": 1, **_WINDOW}, notes="sliding layers"
    ),
    "qwen3": Family("Qwen3Config", {"head_dim": 8}),
    "phi": Family("PhiConfig", {"partial_rotary_factor": 0.5}, targets=["q_proj", "k_proj", "v_proj", "dense"]),
    "phi3": Family("Phi3Config", targets=["qkv_proj", "o_proj"]),
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
        targets=["qkv_proj", "o_proj"],
        notes="two sets of frequencies, by length",
    ),
    "gemma": Family("GemmaConfig", {"head_dim": 8}),
    "gemma2": Family(
        "Gemma2Config",
        {"head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0, **_MIXED},
        notes="softcap, sliding layers",
    ),
    "gemma3_text": Family(
        "Gemma3TextConfig", {"head_dim": 8, "query_pre_attn_scalar": 8, **_MIXED}, notes="sliding layers"
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
            **_WINDOW,
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
            **_MIXED,
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
            **_WINDOW,
        },
        notes="layers that share keys and values, two head sizes, sliding layers",
    ),
    "vaultgemma": Family(
        "VaultGemmaConfig",
        {"head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0, **_MIXED},
        notes="softcap, sliding layers",
    ),
    "cohere": Family("CohereConfig"),
    "cohere2": Family("Cohere2Config", _MIXED, notes="sliding layers, no RoPE on full ones"),
    "olmo": Family("OlmoConfig"),
    "olmo2": Family("Olmo2Config"),
    "olmo3": Family("Olmo3Config", _MIXED, notes="sliding layers"),
    "granite": Family("GraniteConfig", {"attention_multiplier": 0.25}, notes="own logit scale"),
    "smollm3": Family("SmolLM3Config", {"no_rope_layers": [1, 0]}, notes="a layer without RoPE"),
    "glm": Family("GlmConfig", {"head_dim": 8}),
    "glm4": Family("Glm4Config", {"head_dim": 8}),
    "starcoder2": Family("Starcoder2Config", {"sliding_window": None}),
    "stablelm": Family("StableLmConfig", {"partial_rotary_factor": 0.5}),
    "nemotron": Family("NemotronConfig"),
    "exaone4": Family("Exaone4Config", _MIXED, notes="sliding layers, no RoPE on full ones"),
    "hunyuan_v1_dense": Family("HunYuanDenseV1Config", {"head_dim": 8}),
    "ernie4_5": Family("Ernie4_5Config", {"head_dim": 8}),
    "seed_oss": Family("SeedOssConfig", {"head_dim": 8}),
    "bitnet": Family("BitNetConfig"),
    "apertus": Family("ApertusConfig"),
    "arcee": Family("ArceeConfig"),
    "helium": Family("HeliumConfig", {"head_dim": 8}),
    "nanochat": Family("NanoChatConfig"),
    "cwm": Family("CwmConfig", {"head_dim": 8, **_MIXED}, notes="sliding layers"),
    "diffllama": Family("DiffLlamaConfig", kvzip=REFUSED, ccm=REFUSED, notes="difference of two attentions, own code"),
    "persimmon": Family("PersimmonConfig", {"num_key_value_heads": 4}, targets=["query_key_value", "dense"]),
    "doge": Family("DogeConfig", kvzip=REFUSED, ccm=REFUSED, notes="a mask that depends on the values"),
    "modernbert_decoder": Family(
        "ModernBertDecoderConfig",
        {"local_attention": 16, "layer_types": ["sliding_attention", "full_attention"], "num_key_value_heads": 4},
        notes="sliding layers",
    ),
    # mixtures of experts
    "phimoe": Family("PhimoeConfig", {"num_local_experts": 4}),
    "qwen2_moe": Family("Qwen2MoeConfig", {**_EXPERTS, "shared_expert_intermediate_size": 16}),
    "qwen3_moe": Family("Qwen3MoeConfig", _EXPERTS),
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
            "layer_types": ["chunked_attention", "full_attention"],
        },
        notes="chunked layers, queries scaled by position",
    ),
    "gpt_oss": Family(
        "GptOssConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, **_MIXED},
        notes="attention sinks, sliding layers",
    ),
    "dots1": Family("Dots1Config", {**_ROUTED, "n_shared_experts": 1, **_MIXED}, notes="sliding layers"),
    "exaone_moe": Family("ExaoneMoeConfig", {**_EXPERTS, **_MIXED}, notes="sliding layers"),
    "afmoe": Family("AfmoeConfig", {**_EXPERTS, "head_dim": 8, **_MIXED}, notes="gated attention, sliding layers"),
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
        targets=["Wqkv", "out_proj"],
    ),
    "jetmoe": Family(
        "JetMoeConfig",
        {"num_local_experts": 4, "kv_channels": 8, "num_key_value_heads": 2, "num_attention_heads": 4},
        targets=["kv_proj"],
        notes="experts of attention: one query head a key head and expert",
    ),
    "mimo_v2_flash": Family(
        "MiMoV2FlashConfig",
        {**_ROUTED, "head_dim": 12, "v_head_dim": 8, **_MIXED},
        notes="sinks, sliding layers, value width differs from key width",
    ),
    # multi-head latent attention: key and value widths differ
    "deepseek_v2": Family(
        "DeepseekV2Config",
        {**_MLA, **_ROUTED, "n_shared_experts": 1, "first_k_dense_replace": 1},
        targets=["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
        notes="MLA",
    ),
    "deepseek_v3": Family(
        "DeepseekV3Config",
        {**_MLA, **_ROUTED, "n_shared_experts": 1, "first_k_dense_replace": 1},
        targets=["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
        notes="MLA",
    ),
    "glm4_moe_lite": Family(
        "Glm4MoeLiteConfig",
        {**_MLA, **_ROUTED, "n_shared_experts": 1},
        targets=["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
        notes="MLA",
    ),
    "minicpm3": Family(
        "MiniCPM3Config",
        _MLA,
        targets=["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
        notes="MLA",
    ),
    "youtu": Family(
        "YoutuConfig",
        _MLA,
        targets=["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
        notes="MLA",
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
        targets=["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
        notes="MLA, two attentions a layer",
    ),
    # older designs
    "gpt2": Family("GPT2Config", targets=["c_attn"], ccm=REFUSED, notes="learned positions, Conv1D"),
    "gpt_bigcode": Family("GPTBigCodeConfig", targets=["c_attn"], notes="learned positions, one key head"),
    "gpt_neox": Family("GPTNeoXConfig", targets=["query_key_value", "dense"]),
    "opt": Family(
        "OPTConfig",
        {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0},
        targets=["q_proj", "k_proj", "v_proj", "out_proj"],
        notes="learned positions",
    ),
    "biogpt": Family(
        "BioGptConfig",
        {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        targets=["q_proj", "k_proj", "v_proj", "out_proj"],
        notes="learned positions",
    ),
    "gptj": Family(
        "GPTJConfig", {"n_inner": 64, "rotary_dim": 4}, targets=["q_proj", "k_proj", "v_proj", "out_proj"]
    ),
    "codegen": Family("CodeGenConfig", {"n_inner": 64, "rotary_dim": 4}, targets=["qkv_proj", "out_proj"]),
    "falcon": Family("FalconConfig", kvzip=REFUSED, ccm=REFUSED, notes="own attention code, one key head"),
    "falcon_new": Family(
        "FalconConfig",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "multi_query": False},
        kvzip=REFUSED,
        ccm=REFUSED,
        notes="own attention code",
    ),
    "falcon_alibi": Family(
        "FalconConfig",
        {"alibi": True, "multi_query": False, "parallel_attn": False},
        kvzip=REFUSED,
        ccm=REFUSED,
        notes="own attention code, ALiBi",
    ),
    "bloom": Family("BloomConfig", kvzip=REFUSED, ccm=REFUSED, notes="own attention code, ALiBi"),
    "mpt": Family(
        "MptConfig",
        {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 1024, "vocab_size": VOCABULARY},
        kvzip=REFUSED,
        ccm=REFUSED,
        bare=True,
        notes="own attention code, ALiBi",
    ),
    "gpt_neo": Family(
        "GPTNeoConfig",
        {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 16},
        kvzip=REFUSED,
        ccm=REFUSED,
        notes="own attention code",
    ),
    "gpt_neox_japanese": Family("GPTNeoXJapaneseConfig", kvzip=REFUSED, ccm=REFUSED, notes="own attention code"),
    "xglm": Family(
        "XGLMConfig",
        {"d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4, "dropout": 0.0},
        kvzip=REFUSED,
        ccm=REFUSED,
        notes="own attention code",
    ),
    # some layers have a state instead of keys and values: kept whole, and nothing a compression token could hold
    "qwen3_next": Family(
        "Qwen3NextConfig",
        {**_EXPERTS, "shared_expert_intermediate_size": 16, "head_dim": 8, **_LINEAR_LAYERS},
        ccm=REFUSED,
        notes="linear layers",
    ),
    "qwen3_5_text": Family("Qwen3_5TextConfig", {"head_dim": 8, **_LINEAR_LAYERS}, ccm=REFUSED, notes="linear layers"),
    "olmo_hybrid": Family("OlmoHybridConfig", {**_LINEAR_LAYERS}, ccm=REFUSED, notes="linear layers"),
    "lfm2": Family("Lfm2Config", {"layer_types": ["conv", "full_attention"]}, ccm=REFUSED, notes="convolution layers"),
    "lfm2_moe": Family(
        "Lfm2MoeConfig",
        {**_EXPERTS, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
        ccm=REFUSED,
        notes="convolution layers",
    ),
    "minimax": Family(
        "MiniMaxConfig",
        {"num_local_experts": 4, "block_size": 16, "layer_types": ["linear_attention", "full_attention"]},
        ccm=REFUSED,
        notes="linear layers",
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
        notes="Mamba layers",
    ),
    "bamba": Family("BambaConfig", {**_MAMBA, "attn_layer_indices": [1]}, ccm=REFUSED, notes="Mamba layers"),
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
        "FalconH1Config", {**_MAMBA, "mamba_d_ssm": 64}, ccm=REFUSED, notes="attention and Mamba in every layer"
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
    ),
    "recurrent_gemma": Family(
        "RecurrentGemmaConfig",
        {"block_types": ["recurrent", "attention"], "attention_window_size": 16, "lru_width": 32},
        kvzip=REFUSED,
        ccm=REFUSED,
        notes="recurrent and local layers only",
    ),
    "mamba": Family(
        "MambaConfig", {"state_size": 8, "time_step_rank": 4}, kvzip=REFUSED, ccm=REFUSED, notes="no attention"
    ),
    "mamba2": Family(
        "Mamba2Config",
        {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 16},
        kvzip=REFUSED,
        ccm=REFUSED,
        notes="no attention",
    ),
    "falcon_mamba": Family(
        "FalconMambaConfig", {"state_size": 8, "time_step_rank": 4}, kvzip=REFUSED, ccm=REFUSED, notes="no attention"
    ),
    # multimodal models with a text prompt
    "gemma3": Family(
        "Gemma3Config",
        {
            "text_config": _text(head_dim=8, query_pre_attn_scalar=8, **_MIXED),
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
                **_WINDOW,
            ),
            "vision_config": {"hidden_size": 32, "vocab_size": 2, "vocab_offset": VOCABULARY - 4},
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
                **_EXPERTS,
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
                **_LINEAR_LAYERS,
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
        model_class="PaliGemmaForConditionalGeneration",
        notes="ready masks from the wrapper, prefix attends both ways",
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
    ),
}


def available() -> dict[str, Family]:
    """The families that the installed transformers has."""
    return {name: family for name, family in FAMILIES.items() if family.available}
