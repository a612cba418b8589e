"""Training over several processes gives what one process gives: weights, metrics, states, folders – and an error when a process dies."""

from __future__ import annotations

import copy
import gc
import math
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from ray import cloudpickle
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from grpo import aggregation, corrections, kl, objectives, tree_attention
from grpo.batch import Batch, collate
from grpo.config import ConfigError
from grpo.distributed import DistributedPolicy, shares
from grpo.imports import resolve
from grpo.layouts import LayoutName, row_length, rows
from grpo.losses import Loss
from grpo.policy import HFPolicy, OptimSettings
from grpo.ranks import Ranks
from grpo.rollouts.base import Weights
from grpo.rollouts.pool import start_ray, stop_ray
from grpo.rollouts.transfer import handfuls
from grpo.rollouts.weights import WeightStream
from grpo.sharded import RankSettings, ShardedPolicy
from grpo.toy import toy_llama, toy_rollout
from grpo.types import Group, Problem

VOCAB = 24
PLAIN = Loss(objective=objectives.policy_gradient, aggregate=aggregation.token_mean)
FULL = Loss(  # every term, so that every metric is there
    objective=objectives.clipped_surrogate,
    aggregate=aggregation.sequence_mean,
    corrections={"tis": corrections.truncated_importance},
    kl=kl.k3,
    kl_coef=0.1,
    entropy_coef=0.01,
)
ADAM = OptimSettings(lr=1e-2, schedule="linear", warmup=2, num_updates=8, weight_decay=0.1)
SGD = replace(ADAM, name="sgd", lr=0.3)
MICROBATCH = 24  # input tokens: several micro-batches a rank, so that gradients are added up before they are summed


class ExactNorm(nn.Module):
    """Llama's own casts to fp32, which rounds away the difference between right and nearly right."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def toy(seed: int = 0, tied: bool = True, exact: bool = True, checkpointing: bool = False, empty: bool = False) -> Any:
    """One key-value head of 4 makes a weight of 4 rows: of three ranks, the last holds none of it."""
    with torch.device("meta" if empty else "cpu"):
        # dropout, which a policy switches off: else nothing here would be equal
        model = toy_llama(seed, num_key_value_heads=1, tie_word_embeddings=tied, attention_dropout=0.5)
        for module in list(model.modules()) if exact else ():
            for name, _ in module.named_children():
                if "norm" in name:
                    setattr(module, name, ExactNorm(16))
    if checkpointing:
        model.gradient_checkpointing_enable()
    return model


def make_batch(seed: int = 0, groups: Sequence[int] = (3, 1, 4), lengths: tuple[int, int] = (1, 6)) -> Batch:
    """``groups``: rollouts of each group; ``lengths``: the shortest and the longest, in tokens. Prompts have 4, 5, … tokens."""
    rng, made = random.Random(seed), []
    for g, size in enumerate(groups):
        problem, prompt = Problem(id=f"p{g}", prompt="?", answer="1"), tuple(rng.randrange(VOCAB) for _ in range(4 + g))
        rollouts = []
        for i in range(size):
            tokens = [rng.randrange(VOCAB) for _ in range(rng.randint(*lengths))]
            rollouts.append(toy_rollout(problem, i, prompt, tokens, logprobs=(-3.0,) * len(tokens)))
        made.append(Group(problem=problem, rollouts=tuple(rollouts)))
    batch = collate(made)
    values = torch.tensor([rng.choice([-1.0, 1.0, 0.5]) for _ in batch.rollouts])
    return replace(batch, advantages=values[batch.rollout_index], reference_logprobs=torch.full((batch.num_tokens,), -3.1))


@pytest.fixture(scope="module")
def ranks_of() -> Iterator[Callable[[int], Ranks]]:
    """Groups of one, two and three processes, each started once: a test puts its own policy on them."""
    start_ray(num_cpus=9, object_store_memory=100_000_000)
    groups: dict[int, Ranks] = {}

    def get(num: int) -> Ranks:
        if num not in groups:
            groups[num] = Ranks(num, timeout=120)
        return groups[num]

    yield get
    for group in groups.values():
        group.close()
    stop_ray()


def spread(ranks: Ranks, make_model: Any = toy, optim: OptimSettings = ADAM, **settings: Any) -> DistributedPolicy:
    settings = {"dtype_name": "float64", "tokens_per_microbatch": MICROBATCH} | settings
    return DistributedPolicy(ranks, make_model, RankSettings(optim=optim, **settings))


def alone(make_model: Any = toy, optim: OptimSettings = ADAM, layout: LayoutName = "shared_prompt", **settings: Any) -> HFPolicy:
    settings = {"dtype": torch.float64, "tokens_per_microbatch": MICROBATCH} | settings
    return HFPolicy(make_model(), optim, layout=layout, **settings)


def apart(a: Weights, b: Weights) -> float:
    """The largest difference between two sets of tensors of the same names, shapes and types."""
    a, b = dict(WeightStream.of(a)), dict(WeightStream.of(b))
    assert list(a) == list(b)
    assert all(a[name].shape == b[name].shape and a[name].dtype == b[name].dtype for name in a)
    return max(float((a[name] - b[name]).detach().abs().max()) for name in a)


def comparable(metrics: Mapping[str, float]) -> dict[str, float]:
    """Without what depends on the clock."""
    return {name: value for name, value in metrics.items() if name != "throughput/tokens_per_s_update"}


# ---------------------------------------------------------------- who computes what

group_sizes = st.lists(st.integers(1, 6), min_size=1, max_size=6)
layout_names = st.sampled_from(["padded", "packed", "shared_prompt"])


@given(group_sizes, st.integers(1, 5), layout_names, st.integers(0, 99))
def test_every_rollout_has_one_rank_and_no_rank_is_far_above_the_others(sizes: list[int], num: int, layout: LayoutName, seed: int) -> None:
    batch = make_batch(seed, sizes)
    parts = shares(batch, layout, num)
    assert len(parts) == num
    assert sorted(i for part in parts for i in part) == list(range(len(batch.rollouts)))
    assert all(part == sorted(part) for part in parts)
    units = rows(batch, layout, 10**9)
    longest = max(row_length(batch, row) for row in units)
    mine = [batch.select(part) for part in parts]
    load = [sum(row_length(part, row) for row in rows(part, layout, 10**9)) for part in mine]
    fair = sum(row_length(batch, row) for row in units) / num
    assert max(load) <= fair + longest, "dealing to whoever has least keeps everybody within one row of the mean"


def test_groups_stay_whole_unless_parting_them_helps() -> None:
    # prompts of 4 to 7 tokens and three completions of 4, whose last is no input: rows of 13, 14, 15, 16; 16 + 13 = 15 + 14
    four = make_batch(0, [3, 3, 3, 3], lengths=(4, 4))
    assert shares(four, "shared_prompt", 2) == [[0, 1, 2, 9, 10, 11], [3, 4, 5, 6, 7, 8]]
    # six completions of 4 behind a prompt of 4 are 22 inputs; in parts of at most 11 they are 4 + 2 · 3 = 10 each, three of them
    assert [len(part) for part in shares(make_batch(0, [6], lengths=(4, 4)), "shared_prompt", 3)] == [2, 2, 2]


# ---------------------------------------------------------------- the same updates

CASES = [
    ("padded", True, ADAM),
    ("packed", True, SGD),
    ("shared_prompt", True, ADAM),
    ("padded", False, SGD),
    ("packed", False, ADAM),
    ("shared_prompt", False, SGD),
]


@pytest.mark.slow
@pytest.mark.parametrize("num", [1, 2, 3])
@pytest.mark.parametrize(("layout", "tied", "optim"), CASES, ids=lambda v: v.name if isinstance(v, OptimSettings) else str(v))
def test_updates_are_those_of_one_process(
    ranks_of: Callable[[int], Ranks], num: int, layout: LayoutName, tied: bool, optim: OptimSettings
) -> None:
    model = partial(toy, tied=tied)
    one, many = alone(model, optim, layout), spread(ranks_of(num), model, optim, layout=layout)
    assert apart(many.weights(), one.weights()) == 0
    for seed, loss in enumerate((PLAIN, FULL, PLAIN)):
        batch = make_batch(seed)
        expected, scores = one.score(batch), many.score(batch)
        torch.testing.assert_close((scores.logprobs, scores.entropy), (expected.logprobs, expected.entropy), rtol=0, atol=1e-9)
        want, got = comparable(one.update(batch, loss)), comparable(many.update(batch, loss))
        assert want.keys() == got.keys()
        for name, value in want.items():  # stats are fp32 sums
            assert got[name] == pytest.approx(value, abs=1e-9 if name.startswith("policy/") and "ratio" not in name else 1e-5, rel=1e-5)
        assert want["policy/grad_norm"] > 1, "the gradient is clipped, so its norm counts"
        assert apart(many.weights(), one.weights()) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("num", [2, 3])
@pytest.mark.parametrize("optim", [replace(ADAM, lr=1e-3), SGD], ids=lambda o: o.name)
def test_updates_in_float32(ranks_of: Callable[[int], Ranks], num: int, optim: OptimSettings) -> None:
    model = partial(toy, exact=False)
    one, many = alone(model, optim, dtype=torch.float32), spread(ranks_of(num), model, optim, dtype_name="float32")
    for seed in range(3):
        one.update(make_batch(seed), FULL), many.update(make_batch(seed), FULL)
    assert apart(many.weights(), one.weights()) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("num", [2, 3])
@pytest.mark.parametrize("groups", [(1,), (2, 0, 1)], ids=str)
def test_a_rank_without_work_does_no_harm(ranks_of: Callable[[int], Ranks], num: int, groups: tuple[int, ...]) -> None:
    batch = make_batch(0, [size for size in groups if size])
    assert batch.advantages is not None
    one_rollout = replace(batch, advantages=batch.advantages * (batch.rollout_index == 0))  # the others have no signal
    one, many = alone(layout="padded"), spread(ranks_of(num), layout="padded")
    torch.testing.assert_close(many.score(batch).logprobs, one.score(batch).logprobs, rtol=0, atol=1e-9)
    for minibatch in (one_rollout, batch):
        one.update(minibatch, PLAIN), many.update(minibatch, PLAIN)
        assert apart(many.weights(), one.weights()) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("how", ["shard_gradients", "checkpointing"])
def test_ways_to_save_memory_change_nothing(ranks_of: Callable[[int], Ranks], how: str) -> None:
    one = alone()
    settings: dict[str, Any] = {"shard_gradients": True} if how == "shard_gradients" else {"make_model": partial(toy, checkpointing=True)}
    many = spread(ranks_of(2), **settings)
    for seed in range(2):
        one.update(make_batch(seed), PLAIN), many.update(make_batch(seed), PLAIN)
        assert apart(many.weights(), one.weights()) < 1e-9


@pytest.mark.slow
def test_what_does_not_move_the_weights(ranks_of: Callable[[int], Ranks]) -> None:
    """No signal: no step. A loss that is not a number: a step that is counted and moves nothing, on every rank."""
    one, many = alone(), spread(ranks_of(2))
    first, bad = make_batch(), make_batch(1)
    assert first.advantages is not None and bad.advantages is not None
    silent = replace(first, advantages=first.advantages * 0)
    nan = replace(bad, advantages=bad.advantages.masked_fill(bad.rollout_index == 0, math.nan))  # one rollout, hence one rank
    for batch in (first, silent, nan, make_batch(2)):
        want, got = comparable(one.update(batch, PLAIN)), comparable(many.update(batch, PLAIN))
        assert want.keys() == got.keys()
        for name in ("policy/lr", "optim/skipped_updates", "policy/trained_rollouts", "throughput/update_tokens"):
            assert got.get(name) == want.get(name)
        assert apart(many.weights(), one.weights()) < 1e-9
    assert got["optim/skipped_updates"] == 1


@pytest.mark.slow
def test_bf16_learns_in_fp32_masters(ranks_of: Callable[[int], Ranks]) -> None:
    """Forty Adam updates of 10⁻⁴ move a weight by 0.004, half of what bf16 resolves near 1: alone, each would be rounded away."""
    optim = OptimSettings(lr=1e-4, max_grad_norm=0.0)
    one, many = (
        f(optim=optim, make_model=partial(toy, exact=False))
        for f in (partial(alone, dtype=torch.bfloat16), partial(spread, ranks_of(2), dtype_name="bfloat16"))
    )
    start, batch = many.state()["masters"], make_batch()
    for _ in range(40):
        one.update(batch, PLAIN), many.update(batch, PLAIN)
    assert all(w.dtype is torch.bfloat16 for _, w in many.weights())
    masters = many.state()["masters"]
    assert all(master.dtype is torch.float32 for master in masters.values())
    norm = "model.norm.weight"
    assert float((masters[norm] - start[norm]).abs().median()) == pytest.approx(40 * 1e-4, rel=0.25)
    assert float((masters[norm] - one.state()["masters"][norm]).abs().median()) < 0.1 * 40 * 1e-4


@pytest.fixture
def one_rank() -> Iterator[None]:
    """This process alone is the group."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_a_tree_needs_is_made_once_for_all_layers(one_rank: None, checkpointing: bool) -> None:
    """It is found by the tree itself, and FSDP copies what a layer is given if it is to cast it to bf16."""
    settings = RankSettings(optim=ADAM, dtype_name="bfloat16", tokens_per_microbatch=1000)
    policy = ShardedPolicy(partial(toy, exact=False, checkpointing=checkpointing), settings)
    policy.learn_from(cloudpickle.dumps(PLAIN))
    policy.score(make_batch())  # checks no layout: that is the driver's call
    tree_attention._rows.cache_clear()
    policy.update(make_batch())
    found = tree_attention._rows.cache_info()
    layers = policy.model.config.num_hidden_layers
    assert found.misses == 1 and found.hits == (1 + checkpointing) * layers - 1  # one micro-batch; with checkpointing each layer twice


# ---------------------------------------------------------------- going on with another number of ranks


@pytest.mark.slow
@pytest.mark.parametrize("optim", [ADAM, SGD], ids=lambda o: o.name)
def test_a_run_goes_on_with_any_number_of_ranks(ranks_of: Callable[[int], Ranks], optim: OptimSettings, tmp_path: Path) -> None:
    straight = alone(optim=optim)
    for seed in range(5):
        straight.update(make_batch(seed), FULL)

    begun = spread(ranks_of(2), optim=optim)
    for seed in range(2):
        begun.update(make_batch(seed), FULL)
    torch.save(begun.state(), tmp_path / "state.pt")
    saved: dict[str, Any] = torch.load(tmp_path / "state.pt", weights_only=True, mmap=True)

    other = partial(toy, seed=9)  # other weights, so that all of them must come from the state
    policies: list[Callable[[], Any]] = [
        partial(spread, ranks_of(1), other, optim),
        partial(spread, ranks_of(2), other, optim),
        partial(spread, ranks_of(3), other, optim),
        partial(alone, other, optim),
    ]
    for make in policies:
        policy = make()
        policy.load_state(saved)
        loaded = policy.state()
        assert apart(loaded["masters"], saved["masters"]) == 0
        assert loaded["optimiser"]["param_groups"] == saved["optimiser"]["param_groups"]
        assert loaded["optimiser"]["state"].keys() == saved["optimiser"]["state"].keys()
        for index, tensors in saved["optimiser"]["state"].items():
            assert apart(loaded["optimiser"]["state"][index], tensors) == 0
        for seed in range(2, 5):
            metrics = policy.update(make_batch(seed), FULL)
        assert metrics["policy/lr"] == optim.lr * (1 - 2 / 6), "the fifth update, the third after two of warm-up, of eight in all"
        assert apart(policy.weights(), straight.weights()) < 1e-9


@pytest.mark.slow
def test_a_state_of_another_model_is_refused(ranks_of: Callable[[int], Ranks]) -> None:
    policy = spread(ranks_of(1))
    before = dict(policy.weights())
    wider = r"^model\.path: names another model .*: lm_head\.weight is \[\d+, 16\] in its checkpoint, and missing in the model"
    for learner in (policy, policy.snapshot()):
        with pytest.raises(ConfigError, match=wider):
            learner.load_state(alone(partial(toy, tied=False)).state())
    with pytest.raises(ConfigError, match=r"^optim\.name: is adamw, and this run has begun with sgd: "):
        policy.load_state(alone(partial(toy, seed=9), optim=SGD).state())
    assert apart(policy.weights(), before) == 0


@pytest.mark.slow
def test_a_run_goes_on_under_the_settings_that_it_is_given(ranks_of: Callable[[int], Ranks]) -> None:
    saved = alone().state()
    for policy in (spread(ranks_of(1), optim=replace(ADAM, weight_decay=0.5)), alone(optim=replace(ADAM, weight_decay=0.5))):
        policy.load_state(saved)
        assert (
            saved["optimiser"]["param_groups"][0]["weight_decay"] != 0.5 == policy.state()["optimiser"]["param_groups"][0]["weight_decay"]
        )


# ---------------------------------------------------------------- the reference


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_a_snapshot_stays_while_the_policy_learns(ranks_of: Callable[[int], Ranks], dtype: str, tmp_path: Path) -> None:
    batch, ranks = make_batch(), ranks_of(2)
    one, many = alone(dtype=getattr(torch, dtype)), spread(ranks, dtype_name=dtype)
    reference, before, same = many.snapshot(), many.score(batch).logprobs, many.snapshot()
    many.update(batch, PLAIN)
    learnt = many.state()["masters"]
    assert torch.equal(reference.score(batch).logprobs, before)
    assert apart(many.state()["masters"], learnt) == 0, "scoring the reference leaves the policy alone"
    assert not torch.equal(many.score(batch).logprobs, before)
    with pytest.raises(TypeError, match="does not learn"):
        reference.update(batch, PLAIN)

    torch.save(reference.state(), tmp_path / "state.pt")  # as a checkpoint holds it, for this policy or for one process
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = spread(ranks, partial(toy, seed=9), dtype_name=dtype)
    again, elsewhere = resumed.snapshot(), one.snapshot()
    again.load_state(saved)
    elsewhere.load_state(saved)
    assert torch.equal(again.score(batch).logprobs, before)
    torch.testing.assert_close(elsewhere.score(batch).logprobs, before, rtol=0, atol=1e-9 if dtype == "float64" else 0.05)
    assert apart(again.weights(), saved["masters"]) == apart(elsewhere.weights(), saved["masters"]) == 0
    del reference, same
    gc.collect()  # they were of the policy before: the ranks drop nothing that is still wanted
    assert torch.equal(again.score(batch).logprobs, before)


def held(ranks: Ranks) -> list[int]:
    """Numbers of the snapshots that rank 0 holds, read past what a policy offers."""
    import ray

    kept: list[int] = ray.get(ranks._actors[0].__ray_call__.remote(lambda actor: sorted(actor._policy.kept)))
    return kept


@pytest.mark.slow
def test_the_ranks_drop_a_snapshot_with_its_object(ranks_of: Callable[[int], Ranks]) -> None:
    ranks = ranks_of(2)
    policy = spread(ranks)
    snapshots = [policy.snapshot() for _ in range(3)]
    numbers = [snapshot._number for snapshot in snapshots]
    assert held(ranks) == numbers
    del snapshots[1]
    gc.collect()
    assert held(ranks) == [numbers[0], numbers[2]]


# ---------------------------------------------------------------- what others get


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_folder_is_that_of_one_process(ranks_of: Callable[[int], Ranks], tied: bool, dtype: str, tmp_path: Path) -> None:
    model = partial(toy, tied=tied, exact=False)
    one, many = alone(model, dtype=getattr(torch, dtype)), spread(ranks_of(2), model, dtype_name=dtype)
    many.update(make_batch(), PLAIN)
    one.load_state(many.state())
    one.save(tmp_path / "one"), many.save(tmp_path / "many")
    assert apart(load_file(tmp_path / "many/model.safetensors"), load_file(tmp_path / "one/model.safetensors")) == 0
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "many" / name).read_text() == (tmp_path / "one" / name).read_text()
    assert apart(many.weights(), one.weights()) == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "many", dtype="auto")
    assert apart(dict(loaded.named_parameters()), many.weights()) == 0


@pytest.mark.slow
def test_weights_are_gathered_while_they_are_read(ranks_of: Callable[[int], Ranks], monkeypatch: pytest.MonkeyPatch) -> None:
    """So that nobody holds them all. Here each tensor is a handful of its own."""
    many, one = spread(ranks_of(2)), alone()
    gathered: list[str] = []
    ask = many._ranks.all

    def noted(method: str, *args: Any) -> Any:
        gathered.extend(args[0] if method == "gather" else ())
        return ask(method, *args)

    monkeypatch.setattr(many._ranks, "all", noted)
    monkeypatch.setattr("grpo.distributed.handfuls", partial(handfuls, num_bytes=1))
    for weights in (many.weights(), many.snapshot().weights()):
        gathered.clear()
        for number, (name, _) in enumerate(weights, start=1):
            assert gathered[-1] == f"weights/{name}" and len(gathered) == number
        assert len(gathered) == len(weights.specs) == len(one.weights())


# ---------------------------------------------------------------- a user's functions

USERS_FILE = """
import torch
from grpo.objectives import Objective

SHARPNESS = 3.0

def soften(x):
    return torch.tanh(SHARPNESS * x) / SHARPNESS

def objective(log_ratio, advantages, logprobs, strength=1.0):
    return Objective(values=strength * soften(log_ratio + advantages) * logprobs, clipped=torch.zeros_like(log_ratio, dtype=torch.bool))

class Fade:
    '''Halves with every call.'''
    factor = 1.0

    def __call__(self, values, batch):
        self.factor /= 2
        return self.factor * values.sum() / batch.totals.tokens

fade = Fade()

def broken(log_ratio, advantages, logprobs):
    raise ValueError("this objective is not finished")

def fatal(log_ratio, advantages, logprobs):
    import os, signal, torch.distributed as dist
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return objective(log_ratio, advantages, logprobs)
"""


@pytest.fixture
def users_file(tmp_path: Path) -> Path:
    file = tmp_path / "my_loss.py"
    file.write_text(USERS_FILE)
    return file


def from_file(file: Path, name: str, positional: int = 3, **arguments: Any) -> Any:
    return resolve({"fn": f"{file}:{name}", **arguments}, "algo.objective", positional=positional).load()


@pytest.mark.slow
def test_a_loss_from_a_users_file(ranks_of: Callable[[int], Ranks], users_file: Path) -> None:
    loss = Loss(objective=from_file(users_file, "objective", strength=0.5), aggregate=from_file(users_file, "fade", positional=2))
    one, many = alone(tokens_per_microbatch=10**6), spread(ranks_of(2), tokens_per_microbatch=10**6)
    batch = make_batch(0, [2, 2])  # one micro-batch a rank, as in one process, so that what fades has faded as far
    users_file.unlink()  # on another machine it would not be there
    for _ in range(2):
        one.update(batch, copy.deepcopy(loss)), many.update(batch, copy.deepcopy(loss))
        assert apart(many.weights(), one.weights()) < 1e-9


# ---------------------------------------------------------------- when something goes wrong


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[-1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def all_gone(pids: Sequence[int], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(is_alive, pids))


@pytest.mark.slow
def test_a_rank_that_is_killed_is_an_error_and_nothing_stays(ranks_of: Callable[[int], Ranks], users_file: Path) -> None:
    """Rank 1 dies in the middle of an update, while rank 0 is on its way to wait for it."""
    ranks = Ranks(2, timeout=120)
    policy, pids = spread(ranks), ranks.processes()
    policy.update(make_batch(), PLAIN)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?s)^rank 1 of 2 died in 'update': .*\n  → often the system was out of memory") as error:
        policy.update(make_batch(), Loss(objective=from_file(users_file, "fatal"), aggregate=aggregation.token_mean))
    assert time.monotonic() - start < 30
    assert all_gone(pids)
    with pytest.raises(RuntimeError) as later:
        policy.weights()
    assert str(later.value) == str(error.value), "whatever is asked of it later, the reason is the first"
    ranks.close()


@pytest.mark.slow
def test_a_rank_that_hangs_is_found_by_the_others(ranks_of: Callable[[int], Ranks], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grpo.ranks._GRACE", 2.0)  # ray has no death to report
    ranks = Ranks(2, timeout=5)
    policy, pids = spread(ranks), ranks.processes()
    os.kill(pids[1], signal.SIGSTOP)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?s)^rank 0 of 2 failed in 'check_layout': .*no answer came from rank 1"):
        policy.update(make_batch(), PLAIN)
    assert time.monotonic() - start < 60
    assert all_gone(pids)


class Alarm(Exception):
    """What a signal's handler raises, as Ctrl-C does."""


@pytest.mark.slow
def test_an_interruption_leaves_the_ranks_in_step(ranks_of: Callable[[int], Ranks]) -> None:
    """Wherever in a call it falls, all ranks were told or none: they never wait for each other in different calls."""

    def ring(number: int, frame: Any) -> None:
        raise Alarm

    many, one, batch = spread(ranks_of(3)), alone(), make_batch()
    before, interrupted = signal.signal(signal.SIGALRM, ring), 0
    try:
        for delay in (0.0002, 0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.02):
            try:
                signal.setitimer(signal.ITIMER_REAL, delay)
                many.score(batch), dict(many.weights())
                signal.setitimer(signal.ITIMER_REAL, 0)
            except (Alarm, SystemError):  # compiled code that an exception passes through makes a SystemError of it
                interrupted += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupted >= 4
    one.update(batch, PLAIN), many.update(batch, PLAIN)
    assert apart(many.weights(), one.weights()) < 1e-9


@pytest.mark.slow
def test_what_a_rank_raises_arrives_as_it_is(ranks_of: Callable[[int], Ranks], users_file: Path) -> None:
    ranks = Ranks(2, timeout=120)
    policy, pids = spread(ranks), ranks.processes()
    with pytest.raises(ValueError, match=r"^this objective is not finished$"):
        policy.update(make_batch(), Loss(objective=from_file(users_file, "broken"), aggregate=aggregation.token_mean))
    assert all_gone(pids)


@pytest.mark.slow
def test_more_ranks_than_the_machine_has_room_for(ranks_of: Callable[[int], Ranks]) -> None:
    ranks_of(1)
    with pytest.raises(ValueError, match=r"99 ranks with 1 CPU each need 99, and the ray cluster has 9\n  → lower trainer.ranks"):
        Ranks(99)
    with pytest.raises(ValueError, match="2 ranks with 1 GPU each need 2, and the ray cluster has 0"):
        Ranks(2, device="cuda")
