"""At which level policy and anchor are compared: ``f(log_ratio [tokens], rollout_index [tokens]) -> [tokens]``.

``log_ratio`` is log π_θ − log π_anchor of each token, with gradient.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from grpo.notation import written

Tokens = Float[Tensor, " tokens"]
Index = Int[Tensor, " tokens"]


@written("π_θ(oₜ) / π_{anchor}(oₜ), a token at a time", "PPO 1707.06347 Eq. 6; DeepSeekMath 2402.03300 Eq. 3")
def token(log_ratio: Tokens, rollout_index: Index) -> Tokens:
    """ρ_t = π_θ(o_t) / π_anchor(o_t)."""
    return log_ratio


@written("(π_θ(oᵢ) / π_{anchor}(oᵢ))^(1/|oᵢ|), one for the whole completion", "GSPO 2507.18071 Eq. 7")
def sequence(log_ratio: Tokens, rollout_index: Index) -> Tokens:
    """s_i = (π_θ(o_i) / π_anchor(o_i))^(1/|o_i|), the same for every token of completion i (GSPO 2507.18071 Eq. 7)."""
    return sequence_mean(log_ratio, rollout_index)


@written("sg[(π_θ(oᵢ) / π_{anchor}(oᵢ))^(1/|oᵢ|)] · π_θ(oₜ) / sg[π_θ(oₜ)]", "GSPO-token 2507.18071 §4.3")
def sequence_token(log_ratio: Tokens, rollout_index: Index) -> Tokens:
    """The value of ``sequence`` with the gradient of each token alone: GSPO-token (2507.18071 §4.3), for advantages per token."""
    return sequence_mean(log_ratio.detach(), rollout_index) + log_ratio - log_ratio.detach()


def sequence_sum(values: Tokens, rollout_index: Index) -> Tokens:
    """Σ over the tokens of each completion, at every one of them."""
    # There are no more completions than tokens; how many there are would have to be waited for on a GPU.
    num = int(rollout_index.max()) + 1 if rollout_index.numel() and rollout_index.device.type == "cpu" else rollout_index.numel()
    return torch.zeros(num, dtype=values.dtype, device=values.device).index_add(0, rollout_index, values)[rollout_index]


def sequence_mean(values: Tokens, rollout_index: Index) -> Tokens:
    """Mean over the tokens of each completion, at every one of them."""
    return sequence_sum(values, rollout_index) / sequence_sum(torch.ones_like(values), rollout_index)
