"""The objectives of the papers as plain loops over groups, completions and tokens: what every preset is compared with.

Written from the papers, sharing nothing with the package: no flat tensors, no helper for means, no advantage or loss of ours. A token's
log-prob under the trained policy is a scalar tensor, so that autograd gives the gradient of exactly what the loops say; everything else
is a Python float.

A batch is a list of groups, a group a list of ``Completion``. N is the number of completions, P the number of groups. ``w`` is the
package's own addition to every paper but DPPO's: min(π_old/π_sampler, 2) for each token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Completion:
    """Scores and, token by token, the log-probs of one answer."""

    reward: float  # the weighted sum of its parts
    policy: list[Tensor]
    old: list[float]
    sampler: list[float]
    ref: list[float]

    def __len__(self) -> int:
        return len(self.policy)


Group = Sequence[Completion]
Batch = Sequence[Group]


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def std(values: Sequence[float]) -> float:
    return math.sqrt(mean([(v - mean(values)) ** 2 for v in values]))


def normalised(group: Group, c: Completion) -> float:
    """(r − mean) / std; a group whose rewards are all equal teaches nothing."""
    rewards = [other.reward for other in group]
    return 0.0 if max(rewards) == min(rewards) else (c.reward - mean(rewards)) / std(rewards)


def centred(group: Group, c: Completion) -> float:
    return c.reward - mean([other.reward for other in group]) if len({other.reward for other in group}) > 1 else 0.0


def w(c: Completion, t: int) -> float:
    return min(math.exp(c.old[t] - c.sampler[t]), 2.0)


def ppo(rho: Tensor, a: float, low: float, high: float) -> Tensor:
    """PPO's min(ρA, clip(ρ)A)."""
    clipped = min(max(rho.item(), 1 - low), 1 + high)
    return rho * a if rho.item() * a <= clipped * a else rho.new_tensor(clipped * a)


def num_completions(batch: Batch) -> int:
    return sum(len(group) for group in batch)


def num_tokens(batch: Batch) -> int:
    return sum(len(c) for group in batch for c in group)


def grpo(batch: Batch, low: float = 0.2, high: float = 0.2, beta: float = 0.0) -> Tensor:
    """DeepSeekMath Eq. 3, with k3 (Eq. 4) times β: the mean over completions of the mean over tokens."""
    loss = torch.zeros((), dtype=torch.float64)
    for group in batch:
        for c in group:
            a, inner = normalised(group, c), torch.zeros((), dtype=torch.float64)
            for t in range(len(c)):
                inner = inner + w(c, t) * ppo((c.policy[t] - c.old[t]).exp(), a, low, high)
                if beta:
                    x = c.ref[t] - c.policy[t]
                    inner = inner - beta * (x.exp() - x - 1)
            loss = loss - inner / len(c) / num_completions(batch)
    return loss


def deepseek_r1(batch: Batch) -> Tensor:
    """R1: GRPO with ε = 10 and β = 0.001."""
    return grpo(batch, low=10.0, high=10.0, beta=0.001)


def token_mean_ppo(batch: Batch, low: float, high: float) -> Tensor:
    loss = torch.zeros((), dtype=torch.float64)
    for group in batch:
        for c in group:
            for t in range(len(c)):
                loss = loss - w(c, t) * ppo((c.policy[t] - c.old[t]).exp(), normalised(group, c), low, high) / num_tokens(batch)
    return loss


def dapo(batch: Batch) -> Tensor:
    """DAPO §3.3, over the batch as in its code: clip-higher, every token counts the same. The overlong punishment is in the rewards."""
    return token_mean_ppo(batch, 0.2, 0.28)


def grpo_token_mean(batch: Batch) -> Tensor:
    return token_mean_ppo(batch, 0.2, 0.2)


def dr_grpo(batch: Batch, max_tokens: int) -> Tensor:
    """Dr. GRPO: A = r − mean, Σ over tokens, divided by a constant instead of |o|."""
    loss = torch.zeros((), dtype=torch.float64)
    for group in batch:
        for c in group:
            for t in range(len(c)):
                loss = loss - w(c, t) * ppo((c.policy[t] - c.old[t]).exp(), centred(group, c), 0.2, 0.2)
    return loss / (num_completions(batch) * max_tokens)


def gspo(batch: Batch) -> Tensor:
    """GSPO Eq. 5 and 7: one clipped ratio a completion; w, which is by token, makes its mean over tokens visible."""
    loss = torch.zeros((), dtype=torch.float64)
    for group in batch:
        for c in group:
            log_s = sum((c.policy[t] - c.old[t] for t in range(len(c))), torch.zeros((), dtype=torch.float64)) / len(c)
            value = ppo(log_s.exp(), normalised(group, c), 3e-4, 4e-4)
            loss = loss - mean([w(c, t) for t in range(len(c))]) * value / num_completions(batch)
    return loss


def cispo(batch: Batch) -> Tensor:
    """MiniMax-M1 Eq. 4: sg(min(ρ, 5)) A log π, averaged over all tokens, here of the batch."""
    loss = torch.zeros((), dtype=torch.float64)
    for group in batch:
        for c in group:
            for t in range(len(c)):
                weight = min(math.exp(c.policy[t].item() - c.old[t]), 5.0)
                loss = loss - w(c, t) * weight * normalised(group, c) * c.policy[t] / num_tokens(batch)
    return loss


def rloo(batch: Batch) -> Tensor:
    """RLOO §2.3: (r_i − mean of the others) on the whole completion; ρ A, whose gradient on-policy is A ∇log π."""
    loss = torch.zeros((), dtype=torch.float64)
    for group in batch:
        for i, c in enumerate(group):
            others = [other.reward for j, other in enumerate(group) if j != i]
            a = c.reward - mean(others) if others and max(c.reward, *others) != min(c.reward, *others) else 0.0
            for t in range(len(c)):
                loss = loss - w(c, t) * (c.policy[t] - c.old[t]).exp() * a / num_completions(batch)
    return loss


def max_rl(batch: Batch) -> Tensor:
    """MaxRL: (r_i − mean) / mean."""
    loss = torch.zeros((), dtype=torch.float64)
    for group in batch:
        average = mean([c.reward for c in group])
        for c in group:
            a = 0.0 if len({other.reward for other in group}) == 1 else (c.reward - average) / average
            for t in range(len(c)):
                loss = loss - w(c, t) * (c.policy[t] - c.old[t]).exp() * a / num_completions(batch)
    return loss


def reinforce_pp(batch: Batch) -> Tensor:
    """REINFORCE++ v1 §3.1, §3.2 and §3.5: A_t = r − β Σ_{s≥t} KL_s with k1 of the samples, normalised over all tokens; PPO's clip."""
    advantage: list[list[float]] = []
    for group in batch:
        for c in group:
            advantage.append([c.reward - 0.01 * math.fsum(c.sampler[s] - c.ref[s] for s in range(t, len(c))) for t in range(len(c))])
    flat = [a for row in advantage for a in row]
    spread = std(flat) if max(flat) != min(flat) else math.inf
    loss, rows = torch.zeros((), dtype=torch.float64), iter(advantage)
    for group in batch:
        for c in group:
            for t, a in enumerate(next(rows)):
                loss = loss - w(c, t) * ppo((c.policy[t] - c.old[t]).exp(), (a - mean(flat)) / spread, 0.2, 0.2) / len(flat)
    return loss


def sapo(batch: Batch) -> Tensor:
    """SAPO Eq. 5–6: σ(τ(ρ − 1)) · 4/τ, τ = 1 for A > 0, else 1.05."""
    loss = torch.zeros((), dtype=torch.float64)
    for group in batch:
        for c in group:
            a = normalised(group, c)
            tau = 1.0 if a > 0 else 1.05
            for t in range(len(c)):
                rho = (c.policy[t] - c.old[t]).exp()
                gate = 4 / tau / (1 + (-tau * (rho - 1)).exp())
                loss = loss - w(c, t) * gate * a / len(c) / num_completions(batch)
    return loss


def dppo(batch: Batch) -> Tensor:
    """DPPO Eq. 12–13: ratio and trust region to the sampler μ; masked if |π − μ| > 0.15 and ρ moves away in the direction of A."""
    loss = torch.zeros((), dtype=torch.float64)
    for group in batch:
        for c in group:
            a = normalised(group, c)
            for t in range(len(c)):
                rho = (c.policy[t] - c.sampler[t]).exp()
                far = abs(math.exp(c.policy[t].item()) - math.exp(c.sampler[t])) > 0.15
                if far and ((a > 0 and rho.item() > 1) or (a < 0 and rho.item() < 1)):
                    continue
                loss = loss - rho * a / num_tokens(batch)
    return loss


def deepseek_v3_2(batch: Batch) -> Tensor:
    """V3.2 Eq. 5–9: A = r − mean; β = 0.001 times π/π_old · k3; completions with A < 0 and mean log(π_sampler/π) > 0.1 are masked."""
    loss = torch.zeros((), dtype=torch.float64)
    for group in batch:
        for c in group:
            a = centred(group, c)
            drift = mean([c.sampler[t] - c.policy[t].item() for t in range(len(c))])
            keep = 0.0 if a < 0 and drift > 0.1 else 1.0
            for t in range(len(c)):
                rho = (c.policy[t] - c.old[t]).exp()
                x = c.ref[t] - c.policy[t]
                term = keep * w(c, t) * ppo(rho, a, 0.2, 0.2) - 0.001 * rho * (x.exp() - x - 1)
                loss = loss - term / len(c) / num_completions(batch)
    return loss


MAX_TOKENS = 7
PAPERS: dict[str, Callable[[Batch], Tensor]] = {
    "grpo": grpo,
    "grpo_token_mean": grpo_token_mean,
    "deepseek_r1": deepseek_r1,
    "dr_grpo": lambda batch: dr_grpo(batch, MAX_TOKENS),
    "dapo": dapo,
    "gspo": gspo,
    "cispo": cispo,
    "rloo": rloo,
    "max_rl": max_rl,
    "reinforce_pp": reinforce_pp,
    "sapo": sapo,
    "dppo": dppo,
    "deepseek_v3_2": deepseek_v3_2,
}
