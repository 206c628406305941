"""Compressed Context Memory by its definition: one block after the other, one token, one head at a time (Eq. 7.1 to 7.3).

Weights are the adapted model's own parameters, so that gradients can be compared; nothing of the package runs here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional

Heads = list[tuple[torch.Tensor, torch.Tensor]]  # per KV head: keys and values (n, d)


@dataclass
class State:
    """Mem(t) and the attention sink, per layer and KV head; text tokens and steps so far."""

    memory: list[Heads] = field(default_factory=list)
    sink: list[Heads] = field(default_factory=list)
    text: int = 0
    step: int = 0


class Recurrence:
    """h(t) = g_comp(Mem(t-1), c(t)); Mem(t) = g_update(Mem(t-1), h(t)); O(t) ~ f(. | Mem(t), I(t))."""

    def __init__(self, model: Any) -> None:
        self.name, self.config = model.active_adapter, model.peft_config[model.active_adapter]
        self.causal = model.get_base_model()
        self.decoder, self.sizes = self.causal.model, self.causal.config

    def run(self, contexts: list[list[int]], question: list[int]) -> tuple[torch.Tensor, list[list[Heads]]]:
        """Logits (len(question), vocabulary) behind Mem(t), and Mem(1), ..., Mem(t)."""
        state, memories = State(), []
        if self.config.memory == "gist" and contexts:
            contexts = [[token for context in contexts for token in context]]
        for context in contexts:
            state = self.compress(state, context)
            memories.append(state.memory)
        positions = [state.text + i for i in range(len(question))]
        hidden, _ = self.block(
            [self.embed(token) for token in question], positions, [False] * len(question), state, True
        )
        return torch.stack([self.causal.lm_head(h) for h in hidden]), memories

    def compress(self, state: State, context: list[int]) -> State:
        """One step of Eq. 7.1 and 7.2."""
        count = self.config.num_comp_tokens
        rows = self.decoder.embed_tokens.lora_comp_embeddings[self.name]
        inputs = [*(self.embed(token) for token in context), *rows]
        positions = [state.text + i for i in range(len(context) + count)]  # COMP k directly behind the text
        is_comp = [False] * len(context) + [True] * count
        sees = self.config.memory in ("concat", "merge")
        _, kept = self.block(inputs, positions, is_comp, state, sees)
        h = [[(keys[-count:], values[-count:]) for keys, values in heads] for heads in kept]
        sink = state.sink
        if self.config.sink and state.step == 0:
            sink = [[(keys[:1], values[:1]) for keys, values in heads] for heads in kept]
        step = state.step + 1
        return State(self.update(state.memory, h, step), sink, state.text + len(context), step)

    def update(self, memory: list[Heads], h: list[Heads], step: int) -> list[Heads]:
        """Concatenation, or (1 - a_t) Mem(t-1) + a_t h(t) with a_1 = 1."""
        if step == 1:
            return h
        a = self.config.merge_weight or 1 / step
        merged = []
        for old_heads, new_heads in zip(memory, h, strict=True):
            heads = []
            for old, new in zip(old_heads, new_heads, strict=True):
                if self.config.memory.startswith("merge"):
                    heads.append(((1 - a) * old[0] + a * new[0], (1 - a) * old[1] + a * new[1]))
                else:
                    heads.append((torch.cat([old[0], new[0]]), torch.cat([old[1], new[1]])))
            merged.append(heads)
        return merged

    def embed(self, token: int) -> torch.Tensor:
        table = self.decoder.embed_tokens
        return table.weight[token] * float(getattr(table, "embed_scale", 1.0))

    def block(
        self, x: list[torch.Tensor], positions: list[int], is_comp: list[bool], state: State, sees_memory: bool
    ) -> tuple[list[torch.Tensor], list[Heads]]:
        """All layers over one block behind sink and memory: hidden states, and the block's keys and values."""
        kept = []
        for index, layer in enumerate(self.decoder.layers):
            before: Heads = []
            for head in range(self.sizes.num_key_value_heads):
                parts = [state.sink[index][head]] if state.sink else []
                parts += [state.memory[index][head]] if state.memory and sees_memory else []
                empty = x[0].new_zeros(0, self.head_dim)
                before.append((torch.cat([empty, *(p[0] for p in parts)]), torch.cat([empty, *(p[1] for p in parts)])))
            attended, own = self.attention(
                index, layer, [layer.input_layernorm(h) for h in x], positions, is_comp, before
            )
            kept.append(own)
            if hasattr(layer, "pre_feedforward_layernorm"):  # Gemma 3
                x = [h + layer.post_attention_layernorm(a) for h, a in zip(x, attended, strict=True)]
                x = [h + layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(h))) for h in x]
            else:
                x = [h + a for h, a in zip(x, attended, strict=True)]
                x = [h + layer.mlp(layer.post_attention_layernorm(h)) for h in x]
        return [self.decoder.norm(h) for h in x], kept

    @property
    def head_dim(self) -> int:
        return getattr(self.sizes, "head_dim", None) or self.sizes.hidden_size // self.sizes.num_attention_heads

    def attention(
        self, index: int, layer: Any, x: list[torch.Tensor], positions: list[int], is_comp: list[bool], before: Heads
    ) -> tuple[list[torch.Tensor], Heads]:
        """Each token attends to everything before the block, and to its block up to itself (within the window)."""
        module, d = layer.self_attn, self.head_dim
        kinds = getattr(self.sizes, "layer_types", None)
        sliding = kinds is None or kinds[index] == "sliding_attention"
        window = (getattr(self.sizes, "sliding_window", None) if sliding else None) or len(x)
        theta = self.theta(kinds[index] if kinds else None)
        groups = self.sizes.num_attention_heads // self.sizes.num_key_value_heads
        keys: list[list[torch.Tensor]] = [[] for _ in before]
        values: list[list[torch.Tensor]] = [[] for _ in before]
        out = []
        for i, (h, position, comp) in enumerate(zip(x, positions, is_comp, strict=True)):
            q, k, v = (
                self.linear(getattr(module, f"{name}_proj"), h, comp).view(-1, d).unbind(0) for name in ("q", "k", "v")
            )
            results = []
            for head in range(len(before)):
                key = module.k_norm(k[head]) if hasattr(module, "k_norm") else k[head]
                keys[head].append(rotate(key, position, theta))
                values[head].append(v[head])
                seen = slice(max(0, i + 1 - window), i + 1)
                all_keys = torch.cat([before[head][0], torch.stack(keys[head][seen])])
                all_values = torch.cat([before[head][1], torch.stack(values[head][seen])])
                for query in q[head * groups : (head + 1) * groups]:
                    query = module.q_norm(query) if hasattr(module, "q_norm") else query
                    scores = all_keys @ rotate(query, position, theta) * self.scaling
                    results.append(functional.softmax(scores, dim=0) @ all_values)
            out.append(self.linear(module.o_proj, torch.cat(results), comp))
        return out, [(torch.stack(k), torch.stack(v)) for k, v in zip(keys, values, strict=True)]

    @property
    def scaling(self) -> float:
        return 1 / math.sqrt(getattr(self.sizes, "query_pre_attn_scalar", None) or self.head_dim)

    def theta(self, kind: str | None) -> float:
        parameters = self.sizes.rope_parameters
        return float(parameters.get(kind, parameters)["rope_theta"])

    def linear(self, module: Any, x: torch.Tensor, comp: bool) -> torch.Tensor:
        """W x, and (alpha / r) B A x on compression tokens (Eq. 7.4's conditional LoRA)."""
        base = getattr(module, "base_layer", module)
        out = base.weight @ x + (0 if base.bias is None else base.bias)
        if comp and base is not module:
            out = out + module.scaling[self.name] * (
                module.lora_B[self.name].weight @ (module.lora_A[self.name].weight @ x)
            )
        return out


def rotate(x: torch.Tensor, position: int, theta: float) -> torch.Tensor:
    """Rotary embedding of one vector (d,): pairs (i, i + d/2) turn by position * theta^(-2 i / d)."""
    half = x.shape[0] // 2
    angle = position * theta ** (-torch.arange(half, dtype=torch.float32) / half)
    a, b = x[:half], x[half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()])
