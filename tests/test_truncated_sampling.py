"""Training on truncated sampling: the trainer's log-probs are taken over the tokens that the engine's truncation kept."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from grpo import logprobs
from grpo.batch import Batch, collate
from grpo.build import train
from grpo.card import objective_card
from grpo.cli import main
from grpo.config import ConfigError
from grpo.kept import Columns, pack, unpack
from grpo.layouts import LayoutName, lay_out
from grpo.logprobs import token_logprobs
from grpo.plan import plan
from grpo.policy import HFPolicy, OptimSettings
from grpo.recipe import load_recipe
from grpo.rollout_table import groups_of, rollout_table
from grpo.rollouts.base import Begun, Close, Engine, Finished, jobs_of
from grpo.rollouts.hf import HFEngine
from grpo.sharded import Scorer
from grpo.types import Completion, Group, Problem, Request, Rollout, Sampling

CUTS = {  # cold where min-p is on: the tiny model's distributions are so flat that it would cut nothing
    "top_p": Sampling(top_p=0.9, max_new_tokens=12),
    "top_k": Sampling(top_k=20, max_new_tokens=12),
    "min_p": Sampling(temperature=0.15, min_p=0.05, max_new_tokens=12),
    "all": Sampling(temperature=0.3, top_p=0.9, top_k=20, min_p=0.05, max_new_tokens=12),
}


pytestmark = pytest.mark.usefixtures("one_thread")


# --- kept sets in bytes ---


@given(vocab=st.integers(1, 700), share=st.floats(0, 1), seed=st.integers(0, 10**6))
def test_a_set_survives_packing(vocab: int, share: float, seed: int) -> None:
    ids = _sets(1, vocab, share, seed, [seed % vocab])[0]
    packed = pack(np.random.default_rng(seed).permutation(ids), vocab)
    assert unpack(packed, vocab).tolist() == ids.tolist()
    assert len(packed) <= 1 + math.ceil(vocab / 8)


def test_packed_golden() -> None:
    assert pack(np.array([258, 3]), 1000) == b"i\x03\x00\x00\x00\x02\x01\x00\x00"  # 3 and 258 = 1 · 256 + 2, low byte first
    assert pack(np.array([0, 2, 9]), 10) == b"b\x05\x02"  # bits 0 and 2 are 1 + 4; bit 9 is bit 1 of the second byte
    assert unpack(b"", 3).tolist() == [0, 1, 2]


@given(tokens=st.integers(1, 6), vocab=st.integers(1, 40), share=st.floats(0, 1), block=st.integers(1, 3), seed=st.integers(0, 10**6))
def test_the_table_of_bits_is_the_sets(tokens: int, vocab: int, share: float, block: int, seed: int) -> None:
    """Sets of few ids (of a vocabulary 300 times as large, where they are put in together), of many, and whole ones, side by side."""
    for scale in (1, 300):
        sets = _sets(tokens, vocab, share, seed, [seed % vocab] * tokens)
        kept = [pack(ids * scale, vocab * scale) for ids in sets]
        whole = seed % (tokens + 1)  # the number of tokens is none of them
        if whole < tokens:
            kept[whole] = b""
        columns = Columns.of(kept, vocab * scale, torch.device("cpu"), torch.float32)
        ids = columns.ids.numpy()
        assert ids.tolist() == sorted({int(i) for one in kept for i in unpack(one, vocab * scale)})
        found = np.zeros((tokens, len(ids)), bool)
        for start in range(0, len(ids), 8 * block):
            z = torch.zeros(tokens, min(8 * block, len(ids) - start))
            columns.rule_out(z, start, torch.empty(tokens * 8 * block))
            found[:, start : start + z.shape[1]] = (z == 0).numpy()
        assert [ids[row].tolist() for row in found] == [unpack(one, vocab * scale).tolist() for one in kept]


# --- log-probs over them ---


def oracle(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, sets: Sequence[np.ndarray]
) -> tuple[Tensor, Tensor]:
    """Token by token, from the kept logits alone."""
    logits = (hidden @ weight.T + (0 if bias is None else bias)) / temperature
    scores, entropies = [], []
    for row, target, ids in zip(logits, targets.tolist(), sets, strict=True):
        log_p = row[torch.from_numpy(ids)].log_softmax(-1)
        scores.append(log_p[ids.tolist().index(target)])
        entropies.append(-(log_p.exp() * log_p).sum())
    return torch.stack(scores), torch.stack(entropies)


def _sets(tokens: int, vocab: int, share: float, seed: int, targets: Sequence[int]) -> list[np.ndarray]:
    """Random sets of about ``share`` of the vocabulary, each with its target."""
    rng = np.random.default_rng(seed)
    drawn = rng.random((tokens, vocab)) < share
    drawn[np.arange(tokens), targets] = True
    return [np.flatnonzero(row) for row in drawn]


def inputs(tokens: int, width: int, vocab: int, seed: int, spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    leaves = [torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((tokens, width), (vocab, width), (vocab,))]
    targets = torch.randint(vocab, (tokens,), generator=generator)
    return (leaves[0] * spread).requires_grad_(), leaves[1].requires_grad_(), leaves[2].requires_grad_(), targets


@given(
    tokens=st.integers(1, 9),
    vocab=st.integers(1, 60),
    share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    chunk=st.integers(1, 12),
    temperature=st.sampled_from([1.0, 0.6, 2.5]),
    spread=st.sampled_from([1.0, 30.0]),
    bias=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_values_and_gradients(
    tokens: int, vocab: int, share: float, chunk: int, temperature: float, spread: float, bias: bool, seed: int
) -> None:
    """Sets that have nothing to do with the logits: their largest may be far below the largest of all."""
    hidden, weight, b, targets = inputs(tokens, 5, vocab, seed, spread)
    sets = _sets(tokens, vocab, share, seed, targets.tolist())
    kept = [pack(ids, vocab) for ids in sets]
    leaves = [hidden, weight, b] if bias else [hidden, weight]
    arguments = (hidden, weight, b if bias else None, targets, temperature)
    ours, theirs = token_logprobs(*arguments, chunk, kept), oracle(*arguments, sets)
    for mine, true in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-10, atol=1e-10)
    up = torch.randn(2, tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    for rows in ((0,), (1,), (0, 1)):  # the log-prob alone, the entropy alone, both
        grads = torch.autograd.grad([ours[i] for i in rows], leaves, [up[i] for i in rows], retain_graph=True)
        expected = torch.autograd.grad([theirs[i] for i in rows], leaves, [up[i] for i in rows], retain_graph=True)
        for mine, true in zip(grads, expected, strict=True):
            torch.testing.assert_close(mine, true, rtol=1e-9, atol=1e-9)
    nobody = torch.ones(vocab, dtype=torch.bool)
    nobody[np.concatenate(sets)] = False
    assert not grads[1][nobody].any(), "exactly no gradient for what nobody kept"


def test_golden() -> None:
    """Logits ln 6, ln 3, ln 1, ln 100 of which the last is cut: 6/10, 3/10 and 1/10."""
    weight = torch.tensor([6.0, 3.0, 1.0, 100.0]).log()[:, None].requires_grad_()
    kept = [pack(np.array([0, 1, 2]), 4)] * 2
    logprobs, entropy = token_logprobs(torch.ones(2, 1), weight, None, torch.tensor([0, 2]), kept=kept)
    assert logprobs.exp().tolist() == pytest.approx([0.6, 0.1])
    assert entropy.tolist() == pytest.approx([-(0.6 * math.log(0.6) + 0.3 * math.log(0.3) + 0.1 * math.log(0.1))] * 2)
    logprobs[0].backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None and weight.grad.flatten().tolist() == pytest.approx([1 - 0.6, -0.3, -0.1, 0.0])
    assert weight.grad[3] == 0


def test_many_passes_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pass through the vocabulary spans the sets of its own tokens."""
    hidden, weight, bias, targets = inputs(23, 4, 50, seed=1)
    sets = _sets(23, 50, 0.1, 1, targets.tolist())
    arguments = (hidden, weight, bias, targets, 0.9)
    monkeypatch.setattr(logprobs, "TOKENS", 5)
    ours, theirs = token_logprobs(*arguments, 2, [pack(ids, 50) for ids in sets]), oracle(*arguments, sets)
    for mine, true in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-12, atol=1e-12)
    both = [torch.autograd.grad(sum(values.sum() for values in found), [hidden, weight, bias]) for found in (ours, theirs)]
    for mine, true in zip(*both, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-10, atol=1e-10)


def test_what_was_not_kept_cannot_have_been_sampled() -> None:
    hidden, weight, bias, _ = inputs(2, 3, 20, seed=0)
    kept = [pack(np.array([3, 4]), 20), pack(np.array([5]), 20)]
    for target in (5, 6):  # in another token's set, in nobody's
        with pytest.raises(ValueError, match="not among those that truncation kept"):
            token_logprobs(hidden, weight, bias, torch.tensor([target, 5]), kept=kept)
    with pytest.raises(ValueError, match="over a vocabulary of 9 to 16 entries, but the model's head has 20"):
        token_logprobs(hidden, weight, bias, torch.tensor([3, 5]), kept=[pack(np.arange(9), 12)] * 2)
    with pytest.raises(ValueError, match="2 kept sets for 3 tokens"):
        token_logprobs(torch.zeros(3, 3), weight.detach().float(), None, torch.tensor([3, 5, 5]), kept=kept)


class Resident(TorchDispatchMode):
    """The most bytes that results of operations held at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        import weakref

        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                self._alive[storage.data_ptr()] = weakref.ref(storage)
        self._alive = {at: ref for at, ref in self._alive.items() if ref() is not None}
        self.peak = max(self.peak, sum(s.nbytes() for ref in self._alive.values() if (s := ref()) is not None))
        return out


def test_memory_beside_the_heads_gradient_is_at_most_a_twentieth_of_the_logits() -> None:
    """4,096 tokens at a vocabulary of 32,768, where fp32 logits would be 512 MiB, each keeping more than half of it."""
    tokens, width, vocab = 4096, 8, 32_768
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(vocab, width, generator=generator).bfloat16().requires_grad_()
    several = [pack(ids, vocab) for ids in _sets(8, vocab, 0.6, 0, [0] * 8)]
    with Resident() as seen:
        logprobs, entropy = token_logprobs(hidden, weight, None, torch.zeros(tokens, dtype=torch.long), kept=several * (tokens // 8))
        (logprobs.sum() + 0.1 * entropy.sum()).backward()  # type: ignore[no-untyped-call]
    assert seen.peak - (4 + 2) * weight.numel() <= tokens * vocab * 4 / 20  # the gradient's fp32 sum, and that in bf16


# --- engines and trainer ---


@pytest.fixture(scope="module")
def hf_engine(tiny_model: str) -> Engine:
    return HFEngine(tiny_model, dtype="float32")


def requests_for(tokenizer: Any, num_completions: int = 4) -> list[Request]:
    prompts = ("1+2=", "What is 17 + 4?", "Assistant: (3 * 5) / 2 =")
    return [
        Request(problem_id=str(i), prompt_ids=tuple(tokenizer.encode(prompt)), num_completions=num_completions, seed=i)
        for i, prompt in enumerate(prompts)
    ]


def batch_of(completions: Sequence[Completion]) -> Batch:
    """A group for each prompt; of the rewards 0, 1, 2, … all but those in the middle move something."""
    groups: dict[str, list[Rollout]] = {}
    for completion in completions:
        problem = Problem(id=completion.problem_id, prompt="", answer="")
        groups.setdefault(problem.id, []).append(Rollout(problem=problem, completion=completion, scores={}, reward=float(completion.index)))
    return collate([Group(problem=rollouts[0].problem, rollouts=tuple(rollouts)) for rollouts in groups.values()])


def policy_of(folder: str, temperature: float = 1.0, layout: LayoutName = "shared_prompt") -> HFPolicy:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return HFPolicy(model, OptimSettings(), temperature=temperature, layout=layout, tokens_per_microbatch=64)


def without_kept(batch: Batch) -> Batch:
    return replace(batch, rollouts=tuple(replace(r, completion=replace(r.completion, kept=())) for r in batch.rollouts))


def gap(policy: HFPolicy, batch: Batch) -> Tensor:
    return (policy.score(batch).logprobs - batch.behavior_logprobs).abs()


@pytest.mark.parametrize("layout", ["padded", "packed", "shared_prompt"])
@pytest.mark.parametrize("cut", list(CUTS))
def test_the_engines_logprobs_are_the_trainers(cut: str, layout: LayoutName, hf_engine: Engine, tokenizer: Any, tiny_model: str) -> None:
    """In fp32, in every layout, in micro-batches of a few completions: 1e-4 is the bound of ``test_engines`` without truncation."""
    sampling = CUTS[cut]
    batch = batch_of(hf_engine.generate(requests_for(tokenizer), sampling))
    policy = policy_of(tiny_model, sampling.temperature, layout)
    assert float(gap(policy, batch).max()) < 1e-4
    assert float(gap(policy, without_kept(batch)).mean()) > 0.03, "without the sets it would show"


def test_a_batch_carries_the_sets_wherever_it_goes(hf_engine: Engine, tokenizer: Any, tiny_model: str) -> None:
    batch = batch_of(hf_engine.generate(requests_for(tokenizer), CUTS["top_p"]))
    policy, whole = policy_of(tiny_model), None
    whole = policy.score(batch).logprobs
    order = list(range(len(batch.rollouts)))
    random.Random(0).shuffle(order)
    part = batch.select(order[:7])
    starts = torch.searchsorted(batch.rollout_index, torch.arange(len(batch.rollouts) + 1))
    expected = torch.cat([whole[starts[i] : starts[i + 1]] for i in order[:7]])
    torch.testing.assert_close(policy.score(part).logprobs, expected, rtol=0, atol=1e-5)
    for minibatch in batch.minibatches(3):
        assert float(gap(policy, minibatch).max()) < 1e-4
    mixed = replace(batch, rollouts=(*without_kept(batch).rollouts[:4], *batch.rollouts[4:]))  # a set nowhere: nothing was cut there
    first = batch.rollout_index < 4
    assert float(gap(policy, mixed)[~first].max()) < 1e-4
    torch.testing.assert_close(policy.score(mixed).logprobs[first], policy.score(without_kept(batch)).logprobs[first], rtol=0, atol=1e-5)


def test_a_rank_takes_them_too(hf_engine: Engine, tokenizer: Any, tiny_model: str) -> None:
    batch = batch_of(hf_engine.generate(requests_for(tokenizer), CUTS["top_p"]))
    scorer = Scorer(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), temperature=1.0)
    logprobs, _ = scorer(lay_out([[rollout] for rollout in batch.rollouts], "padded"))
    torch.testing.assert_close(logprobs.detach(), batch.behavior_logprobs, rtol=0, atol=1e-4)


def test_only_truncation_makes_sets(hf_engine: Engine, tokenizer: Any) -> None:
    for sampling in (Sampling(max_new_tokens=5), Sampling(temperature=0.0, top_p=0.5, max_new_tokens=5)):
        assert not sampling.truncates
        assert all(c.kept == () for c in hf_engine.generate(requests_for(tokenizer), sampling))
    top_k = hf_engine.generate(requests_for(tokenizer), Sampling(top_k=7, max_new_tokens=5))
    assert {len(unpack(one, len(tokenizer))) for c in top_k for one in c.kept} == {7}
    assert all(token in unpack(one, len(tokenizer)) for c in top_k for token, one in zip(c.token_ids, c.kept, strict=True))


def paused(engine: Engine, requests: Sequence[Request], sampling: Sampling, steps: int) -> list[Completion]:
    """What ``generate`` returns, put down after some steps and taken up again."""

    def run(jobs: Sequence[Any], limit: int | None) -> Finished:
        coming, found = iter([jobs]), []
        made = 0

        def feed(idle: bool) -> Any:
            return Close.pause if limit is not None and made >= limit else next(coming, Close.finish)

        for finished in engine.serve(feed, sampling):
            made += 1
            found += finished
        return found

    jobs = jobs_of(requests)
    first = run(jobs, steps)
    done = {number: result for number, result in first if isinstance(result, Completion)}
    again = [replace(jobs[number], begun=result) for number, result in first if isinstance(result, Begun)]
    assert again
    done |= dict(run(again, None))  # type: ignore[arg-type]
    return [done[number] for number in sorted(done)]


def test_a_completion_that_was_paused_has_the_sets_of_all_its_tokens(hf_engine: Engine, tokenizer: Any, tiny_model: str) -> None:
    whole = hf_engine.generate(requests_for(tokenizer), CUTS["top_p"])
    parts = paused(hf_engine, requests_for(tokenizer), CUTS["top_p"], steps=5)
    assert [c.token_ids for c in parts] == [c.token_ids for c in whole]
    assert [c.kept for c in parts] == [c.kept for c in whole]
    assert float(gap(policy_of(tiny_model), batch_of(parts)).max()) < 1e-4


def test_sets_survive_the_table(hf_engine: Engine, tokenizer: Any) -> None:
    batch = batch_of(hf_engine.generate(requests_for(tokenizer), CUTS["all"]))
    groups = [
        Group(problem=r.problem, rollouts=tuple(x for x in batch.rollouts if x.problem == r.problem)) for r in batch.rollouts[::4]
    ]
    back = groups_of(rollout_table(1, groups, {}, {}))
    assert [r.completion.kept for g in back for r in g.rollouts] == [r.completion.kept for g in groups for r in g.rollouts]
    assert all(r.completion.kept for g in back for r in g.rollouts)


def test_a_set_for_every_sampled_token(hf_engine: Engine, tokenizer: Any) -> None:
    (completion, *_) = hf_engine.generate(requests_for(tokenizer), CUTS["top_p"])
    with pytest.raises(ValueError, match=r"completion 0 of problem '0': kept has length 1, but \d+ tokens were sampled"):
        replace(completion, kept=completion.kept[:1])
    tool = replace(
        completion,
        token_ids=(*completion.token_ids, 5, 6),
        logprobs=(*completion.logprobs, 0.0, 0.0),
        policy_versions=(*completion.policy_versions, 0, 0),
        sampled=(True,) * len(completion.token_ids) + (False, False),
    )
    assert len(tool.kept) == tool.num_sampled


@pytest.mark.slow
def test_vllm_reports_what_it_kept(tokenizer: Any, tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through our logits processor, where prompts are computed in parts and requests are preempted for want of cache."""
    from grpo.rollouts.vllm import VLLMEngine  # before anything of vLLM's: it sets its environment

    arguments = {"num_gpu_blocks_override": 6, "kv_cache_memory_bytes": 64 << 20, "max_num_batched_tokens": 24, "max_num_seqs": 8}
    engine = VLLMEngine(tiny_model, dtype="float32", max_model_len=128, engine_args=arguments)
    from vllm.v1.core.sched.scheduler import Scheduler

    preempt, preempted = Scheduler._preempt_request, []
    monkeypatch.setattr(Scheduler, "_preempt_request", lambda *args, **kwargs: preempted.append(preempt(*args, **kwargs)))
    try:
        for cut in CUTS.values():
            sampling = replace(cut, max_new_tokens=30)
            batch = batch_of(engine.generate(requests_for(tokenizer), sampling))
            policy = policy_of(tiny_model, sampling.temperature)
            assert float(gap(policy, batch).max()) < 1e-4
            assert float(gap(policy, without_kept(batch)).mean()) > 0.03
        whole = engine.generate(requests_for(tokenizer), CUTS["top_p"])
        parts = paused(engine, requests_for(tokenizer), CUTS["top_p"], steps=5)
        assert [c.token_ids for c in parts] == [c.token_ids for c in whole]
        assert float(gap(policy_of(tiny_model), batch_of(parts)).max()) < 1e-4
        assert preempted
    finally:
        engine.close()


# --- runs ---

TINY = (
    "run.steps=4",
    "run.checkpoint_every=2",
    "rollout.problems_per_step=4",
    "rollout.completions_per_problem=8",
    "rollout.max_new_tokens=6",
    "eval.every=0",
    "eval.problems=4",
    "logger.console=false",
)


def test_a_run_with_truncated_sampling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Engine and trainer agree to rounding in every step, two updates each, towards a reference; and a stored step is trained again."""
    config = load_recipe(
        "tiny_digits", f"run.dir={tmp_path}", *TINY, "rollout.top_p=0.9", "rollout.min_p=0.01", "optim.updates_per_step=2",
        "algo.kl.fn=grpo.kl.k3", "algo.kl.coef=0.01",
    )  # fmt: skip
    result = train(config)
    rows = [row for row in result.metrics if "sampler/logprob_diff" in row]
    assert len(rows) == 4
    assert all(row["sampler/logprob_diff_max"] < 1e-4 for row in rows)
    assert all(row["policy/entropy"] > 0 for row in rows) and rows[0]["policy/kl"] < rows[-1]["policy/kl"]
    stored = groups_of(result.run.read_rollouts(4))
    assert all(len(r.completion.kept) == len(r.completion.token_ids) for g in stored for r in g.rollouts)
    assert main(["replay", str(result.run.path), "--train", "--step", "3"]) == 0
    text = capsys.readouterr().out
    assert "policy/grad_norm" in text and "differs" not in text


def test_the_card_says_so() -> None:
    card = objective_card(plan(load_recipe("tiny_digits", "rollout.top_p=0.9", "rollout.top_k=40")))
    assert "over the tokens that top-k 40 and top-p 0.9 left" in card
    assert "min-p" not in card
    assert "left to choose" not in objective_card(plan(load_recipe("tiny_digits")))


@pytest.mark.parametrize(
    ("words", "key", "says"),
    [
        (["rollout.gpus_per_engine=1", "rollout.top_p=0.9"], "rollout.top_p", "only if every request sets top_k and none is greedy"),
        (["rollout.gpus_per_engine=1", "rollout.top_k=9"], "rollout.top_k", "set it to 0 (evaluations are free)"),
        (["rollout=scripted", "rollout.min_p=0.1"], "rollout.min_p", "come from no distribution that could be truncated"),
        (["rollout.min_p=1"], "rollout.min_p", "must be in [0, 1)"),
        (["eval.min_p=-0.1"], "eval.min_p", "must be in [0, 1)"),
        (["rollout.top_k=1"], "rollout.top_k", "all the same"),
        (["rollout.top_k=-1"], "rollout.top_k", "0 is off"),
    ],
)
def test_what_cannot_work_is_refused(words: Sequence[str], key: str, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        plan(load_recipe("r1_zero_arithmetic", *words))
    assert error.value.key == key and says in str(error.value)
    if says.startswith("only"):
        plan(load_recipe("r1_zero_arithmetic", "rollout.gpus_per_engine=1", "eval.top_p=0.9"))
