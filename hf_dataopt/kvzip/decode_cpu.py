"""One decoded token on a CPU: a fused kernel for each head of a ragged context, one for the tail behind it, and little between.

The same calls as by way of `attend_ragged` and `attend`, bit for bit; what these check and reshape for any query costs a token
as much as the kernels do.
"""

from __future__ import annotations

import torch

from .._compat import cpu_flash, has_cpu_flash
from .kernels import is_one_token
from .ragged import Ragged


def takes_token(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Ragged) -> bool:
    """Whether `attend_token` reads this call: one token on a CPU, behind heads of which each kept something."""
    if query.device.type != "cpu" or 0 in context.lengths or value.shape[3] != query.shape[3]:
        return False
    return is_one_token(query, key, value, context) and has_cpu_flash()


def attend_token(
    query: torch.Tensor, context: Ragged, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention of one token over a ragged context and the tail behind it.

    Args:
        query: (1, H, 1, d).
        context: the kept pairs, some of every head.
        key, value: (1, KV heads, n, d), the tail.
        scale: factor on the logits.

    Returns:
        (1, H, 1, d).

    Source: section 8.4.1 (variable-length attention over what stays).
    Cost: KV heads + 1 fused kernels and five small ones.
    """
    # the heads of a group are rows that read their keys once
    by_head = query.reshape(1, key.shape[1], -1, query.shape[3])
    tail, tail_lse = cpu_flash(by_head, key, value, None, False, scale)
    heads = context.heads()
    found = [cpu_flash(by_head[:, at : at + 1], *pairs, None, False, scale) for at, pairs in enumerate(heads)]
    output, lse = torch.cat([one for one, _ in found], 1), torch.cat([one for _, one in found], 1)
    # softmax over two numbers is a sigmoid of their difference
    weight = torch.sigmoid(tail_lse - lse).unsqueeze(-1)
    return torch.lerp(output, tail, weight.to(tail.dtype)).reshape(query.shape)
