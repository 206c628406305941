"""Designs from before Llama: learned positions, ALiBi, attention code of their own."""

from __future__ import annotations

from .family import EITHER, VOCABULARY, Family

OLDER: dict[str, Family] = {
    "gpt2": Family("GPT2Config", targets=("c_attn",), notes="learned positions, Conv1D"),
    "gpt_bigcode": Family("GPTBigCodeConfig", targets=("c_attn",), notes="learned positions, one key head"),
    "gpt_neox": Family("GPTNeoXConfig", targets=("query_key_value", "dense")),
    "opt": Family(
        "OPTConfig",
        {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0},
        targets=("q_proj", "k_proj", "v_proj", "out_proj"),
        notes="learned positions",
    ),
    "biogpt": Family(
        "BioGptConfig",
        {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        targets=("q_proj", "k_proj", "v_proj", "out_proj"),
        notes="learned positions",
    ),
    "gptj": Family(
        "GPTJConfig",
        {"n_inner": 64, "rotary_dim": 4},
        targets=("q_proj", "k_proj", "v_proj", "out_proj"),
        ccm=EITHER,
        kvzip=EITHER,
        notes="own attention code before 5.24",
    ),
    "codegen": Family(
        "CodeGenConfig",
        {"n_inner": 64, "rotary_dim": 4},
        targets=("qkv_proj", "out_proj"),
        ccm=EITHER,
        kvzip=EITHER,
        notes="own attention code before 5.24",
    ),
    "falcon": Family(
        "FalconConfig",
        kvzip=EITHER,
        ccm=EITHER,
        notes="own attention code, one key head",
        targets=("query_key_value", "dense"),
    ),
    "falcon_new": Family(
        "FalconConfig",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "multi_query": False},
        kvzip=EITHER,
        ccm=EITHER,
        notes="own attention code",
        targets=("query_key_value", "dense"),
    ),
    "falcon_alibi": Family(
        "FalconConfig",
        {"alibi": True, "multi_query": False, "parallel_attn": False},
        kvzip=EITHER,
        ccm=EITHER,
        notes="own attention code, ALiBi",
        targets=("query_key_value", "dense"),
    ),
    "bloom": Family(
        "BloomConfig", kvzip=EITHER, ccm=EITHER, notes="own attention code, ALiBi", targets=("query_key_value", "dense")
    ),
    "mpt": Family(
        "MptConfig",
        {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 1024, "vocab_size": VOCABULARY},
        kvzip=EITHER,
        ccm=EITHER,
        bare=True,
        notes="own attention code, ALiBi",
        targets=("Wqkv", "out_proj"),
    ),
    "gpt_neo": Family(
        "GPTNeoConfig",
        {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 16},
        kvzip=EITHER,
        ccm=EITHER,
        notes="own attention code",
        targets=("q_proj", "k_proj", "v_proj", "out_proj"),
    ),
    "gpt_neox_japanese": Family(
        "GPTNeoXJapaneseConfig",
        kvzip=EITHER,
        ccm=EITHER,
        notes="own attention code",
        targets=("query_key_value", "dense"),
    ),
    "xglm": Family(
        "XGLMConfig",
        {"d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4, "dropout": 0.0},
        kvzip=EITHER,
        ccm=EITHER,
        notes="own attention code",
        targets=("q_proj", "k_proj", "v_proj", "out_proj"),
    ),
}
