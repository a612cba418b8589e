"""The counter-based sampler against naive references."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo.kept import unpack
from grpo.rollouts.sampling import completion_key, sample, uniforms


def settings(
    rows: int, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.full((rows,), temperature), torch.full((rows,), top_p), torch.full((rows,), top_k), torch.full((rows,), min_p)


def numbers(rows: int, seed: int = 0, position: int = 0) -> Tensor:
    keys = torch.tensor([completion_key(seed, index) for index in range(rows)])
    return uniforms(keys, torch.full((rows,), position))


def naive_logprobs(logits: Tensor, temperature: float, top_p: float, top_k: int, min_p: float = 0.0) -> Tensor:
    """One row, token by token in Python floats; -inf where truncated."""
    scaled = (logits.double() / temperature).tolist()
    total = math.fsum(map(math.exp, scaled))
    probabilities = [math.exp(x) / total for x in scaled]
    order = sorted(range(len(scaled)), key=lambda token: -probabilities[token])
    order = [token for token in order if probabilities[token] >= min_p * probabilities[order[0]]]
    if top_k:
        order = order[:top_k]
    left = math.fsum(probabilities[token] for token in order)
    kept: list[int] = []
    for token in order:
        if math.fsum(probabilities[t] for t in kept) >= top_p * left:
            break
        kept.append(token)
    total = math.fsum(probabilities[token] for token in kept)
    out = torch.full((len(scaled),), -math.inf, dtype=torch.float64)
    for token in kept:
        out[token] = math.log(probabilities[token] / total)
    return out


def test_keys_and_uniforms_are_pinned() -> None:
    """Recorded text would change if the hash did. The first is splitmix64's finaliser by hand."""
    assert completion_key(0, 0) == 0xE220A8397B1DCDAF - 2**64  # mix(mix(0) + 0x9E3779B97F4A7C15), and mix(0) = 0
    assert uniforms(torch.tensor([0]), torch.tensor([0])).item() == (0xE220A8397B1DCDAF >> 11) * 2.0**-53
    keys = {completion_key(seed, index) for seed in (0, 1, 2**62, 2**63 - 1) for index in range(100)}
    assert len(keys) == 400 and all(-(2**63) <= key < 2**63 for key in keys)


def test_uniforms_look_uniform_and_independent() -> None:
    u = torch.stack([numbers(4096, seed=3, position=position) for position in range(16)])
    assert u.dtype == torch.float64 and u.min() >= 0 and u.max() < 1
    counts = torch.histc(u, bins=64, min=0, max=1)
    assert float(((counts - 1024) ** 2 / 1024).sum()) < 104  # χ², 63 degrees of freedom: 99.9 %
    assert float(torch.corrcoef(u).fill_diagonal_(0).abs().max()) < 0.07  # 4.5 σ of 4096 samples, between positions


@pytest.mark.parametrize("vocab", [7, 256, 300, 1024])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_frequencies_are_the_softmax(vocab: int, temperature: float) -> None:
    rows = 20_000
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(vocab)) * 1.5
    tokens, _, kept = sample(logits.repeat(rows, 1), numbers(rows, seed=vocab), *settings(rows, temperature))
    assert kept == []
    expected = rows * torch.softmax(logits.double() / temperature, 0)
    counts = torch.bincount(tokens, minlength=vocab).double()
    common = expected >= 5  # the χ² approximation wants no smaller cell; the rest is pooled
    observed = torch.cat([counts[common], counts[~common].sum().reshape(1)])
    wanted = torch.cat([expected[common], expected[~common].sum().reshape(1)]).clamp(min=1e-9)
    chi2 = float(((observed - wanted) ** 2 / wanted)[wanted > 1].sum())
    degrees = int((wanted > 1).sum()) - 1
    assert chi2 < degrees + 4 * math.sqrt(2 * degrees), (chi2, degrees)


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k", "min_p"),
    [
        (1.0, 1.0, 0, 0.0),
        (0.7, 1.0, 0, 0.0),
        (1.3, 0.8, 0, 0.0),
        (1.0, 1.0, 5, 0.0),
        (0.9, 0.6, 40, 0.0),
        (1.0, 1e-6, 0, 0.0),
        (1.0, 1.0, 0, 0.05),
        (1.5, 1.0, 0, 1e-4),
        (0.8, 0.7, 30, 0.02),
        (1.2, 0.9, 0, 0.01),
    ],
)
@pytest.mark.parametrize("vocab", [50, 1500])
def test_logprobs_and_support_equal_a_naive_reference(vocab: int, temperature: float, top_p: float, top_k: int, min_p: float) -> None:
    rows = 400
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(1)) * 2
    tokens, logprobs, kept = sample(logits.repeat(rows, 1), numbers(rows), *settings(rows, temperature, top_p, top_k, min_p))
    expected = naive_logprobs(logits, temperature, top_p, top_k, min_p)
    assert torch.isfinite(expected[tokens]).all(), "a truncated token was sampled"
    torch.testing.assert_close(logprobs, expected[tokens], atol=2e-6, rtol=0)
    support = torch.isfinite(expected).nonzero().flatten().tolist()
    truncates = top_p < 1 or top_k > 0 or min_p > 0
    assert [unpack(one, vocab).tolist() for one in set(kept)] == ([support] if truncates else [])
    if top_k == 5:
        assert len(tokens.unique()) == 5


@pytest.mark.parametrize("cut", [{"top_p": 0.9}, {"min_p": 0.5}, {"top_p": 0.9, "min_p": 0.5}, {"top_k": 2500}], ids=str)
def test_flat_distribution_beyond_the_first_candidates(cut: dict[str, Any]) -> None:
    """More entries stay than the first look at the largest 1,024 finds."""
    vocab, rows = 5000, 2000
    logits = torch.linspace(0, 1, vocab)
    tokens, logprobs, kept = sample(logits.repeat(rows, 1), numbers(rows), *settings(rows, **cut))
    expected = naive_logprobs(logits, **{"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0} | cut)
    assert torch.isfinite(expected[tokens]).all() and tokens.min() < 3000
    assert [unpack(one, vocab).tolist() for one in set(kept)] == [torch.isfinite(expected).nonzero().flatten().tolist()]
    torch.testing.assert_close(logprobs, expected[tokens], atol=2e-6, rtol=0)


def test_temperature_zero_is_greedy_with_the_plain_logprob() -> None:
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(2))
    expected = torch.log_softmax(logits.double(), -1).max(-1)
    tokens, logprobs, kept = sample(logits.clone(), numbers(5), *settings(5, 0.0, 0.5, 3, 0.1))
    assert kept == []
    assert torch.equal(tokens, expected.indices)
    torch.testing.assert_close(logprobs, expected.values, atol=1e-6, rtol=0)


def test_never_a_token_of_probability_zero() -> None:
    """Extremes of the uniform, with zeros at both ends, between, and whole blocks of them."""
    logits = torch.full((1, 1000), -math.inf)
    logits[0, [3, 700]] = torch.tensor([0.0, 1.0])
    for u in (0.0, 2.0**-53, 1 / (1 + math.e), 0.5, 1 - 2.0**-53):
        token, logprob, _ = sample(logits.clone(), torch.tensor([u], dtype=torch.float64), *settings(1))
        assert token.item() in (3, 700) and math.isfinite(logprob.item())
    assert token.item() == 700


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_broken_logits_are_an_error(bad: float) -> None:
    logits = torch.zeros(3, 10)
    logits[1] = bad
    with pytest.raises(ValueError, match=r"rows \[1\]"):
        sample(logits, numbers(3), *settings(3))


def test_a_row_depends_on_itself_alone() -> None:
    """Mixed settings in one batch give, bit for bit, what each row gives by itself."""
    rows, vocab = 24, 3001
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(3)) * 3
    u = numbers(rows, seed=9)
    temperature = torch.tensor([1.0, 0.7, 0.0, 1.5] * 6)
    top_p = torch.tensor([1.0, 1.0, 1.0, 0.9, 0.5, 1.0] * 4)
    top_k = torch.tensor([0, 0, 20] * 8)
    min_p = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 0.1, 0.0, 0.2] * 3)
    together = sample(logits.clone(), u, temperature, top_p, top_k, min_p)
    for row in range(rows):
        one = slice(row, row + 1)
        alone = sample(logits[one].clone(), u[one], temperature[one], top_p[one], top_k[one], min_p[one])
        assert alone.tokens.item() == together.tokens[row].item()
        assert alone.logprobs.item() == together.logprobs[row].item()
        assert (alone.kept or [b""]) == together.kept[row : row + 1]
        is_cut = temperature[row] > 0 and (top_p[row] < 1 or top_k[row] > 0 or min_p[row] > 0)
        assert bool(together.kept[row]) == bool(is_cut)
