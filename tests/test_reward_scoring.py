"""Scoring over the nodes of a Ray cluster: two nodes on this machine, the real runtime in each."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from grpo.rewards.base import parse_reward_config
from grpo.rewards.runtime import RewardRuntime
from grpo.rollouts.scoring import RemoteRuntimes, scoring_runtime
from grpo.types import Completion, FinishReason, Outcome, Problem, Score

pytestmark = pytest.mark.slow

USER_FILE = """
import os, time

def node(completion, problem):
    '''On which node this runs: 1 or 2, as the test numbers them.'''
    return float(os.environ["TEST_NODE"])

def behave(completion, problem):
    while completion.text == "loop":
        pass
    if completion.text == "wait":
        time.sleep(0.2)
    return len(completion.text)

def ranks(completions, problems):
    return [float(sorted(c.text for c in completions).index(c.text)) for c in completions]
"""
PROBLEM = Problem(id="p", prompt="", answer="12")
LIMITS: dict[str, Any] = {"num_workers": 1, "cpu_s": 0.5, "wall_s": 30.0}


def completion(text: str) -> Completion:
    return Completion(
        problem_id="p", index=0, prompt_ids=(1,), token_ids=(), text=text, logprobs=(), policy_versions=(), finish_reason=FinishReason.stop
    )


def score(runtime: RemoteRuntimes | RewardRuntime, *texts: str) -> list[dict[str, Score]]:
    return runtime.score([completion(text) for text in texts], [PROBLEM] * len(texts))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes; every process of the second one, and of the first, knows which it is on."""
    import ray
    from ray.cluster_utils import Cluster

    made = Cluster()
    for number in (1, 2):
        made.add_node(num_cpus=1, object_store_memory=80_000_000, include_dashboard=False, env_vars={"TEST_NODE": str(number)})
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture
def parts(tmp_path: Path) -> Callable[..., Any]:
    path = tmp_path / "my_rewards.py"
    path.write_text(USER_FILE)
    return lambda *names: parse_reward_config({name: {"fn": f"{path}:{name}"} for name in names})


def actor_pids(runtime: RemoteRuntimes) -> list[int]:
    import ray

    pids = [actor.__ray_call__.remote(lambda self: os.getpid()) for actor in runtime._actors.values()]
    return list(ray.get(pids))


def workers_of(pids: list[int]) -> set[int]:
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if (
                int(stat.read_text().rpartition(")")[2].split()[1]) in pids
                and b"grpo.rewards.worker" in (stat.parent / "cmdline").read_bytes()
            ):
                found.add(int(stat.parent.name))
        except OSError:
            continue
    return found


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def test_one_machine_uses_its_own_runtime(parts: Callable[..., Any]) -> None:
    with scoring_runtime(parts("behave"), **LIMITS) as runtime:
        assert isinstance(runtime, RewardRuntime)
    with pytest.raises(RuntimeError, match="ray is not running"):
        RemoteRuntimes(parts("behave"))


def test_both_nodes_score_and_the_order_stays(cluster: Any, parts: Callable[..., Any]) -> None:
    texts = [f"{'x' * (i % 7)}{i:02d}" for i in range(64)]
    texts[20], texts[50] = "loop", "loop"
    seen: list[tuple[int, int]] = []
    with scoring_runtime(parts("ranks", "behave", "node"), **LIMITS) as runtime:
        assert isinstance(runtime, RemoteRuntimes) and runtime.num_nodes == 2
        scores = runtime.score([completion(t) for t in texts], [PROBLEM] * 64, progress=lambda done, total: seen.append((done, total)))
        pids = workers_of(actor_pids(runtime))
        assert len(pids) == 4  # on each node one, and its spare
    assert [list(by_name) for by_name in scores] == [["ranks", "behave", "node"]] * 64
    assert {by_name["node"].value for by_name in scores} == {1.0, 2.0}
    for i, by_name in enumerate(scores):
        if i in (20, 50):
            assert by_name["behave"].outcome is Outcome.timeout and not by_name["behave"].scored
        else:
            assert by_name["behave"] == Score(value=float(len(texts[i])))
        assert by_name["ranks"].value == sorted(texts).index(texts[i])  # the whole batch was in one place
    assert sorted(set(seen)) == [(done, 64) for done in range(65)] and seen == sorted(seen)
    assert wait_until(lambda: not any(map(alive, pids)))


def test_what_a_lost_actor_held_is_scored_by_another(cluster: Any, parts: Callable[..., Any]) -> None:
    with RemoteRuntimes(parts("behave"), **LIMITS) as runtime:
        victim = actor_pids(runtime)[0]
        orphans, to_kill = workers_of([victim]), [victim]

        def kill(done: int, total: int) -> None:
            if done == 1 and to_kill:
                os.kill(to_kill.pop(), signal.SIGKILL)

        scores = runtime.score([completion("wait")] * 16, [PROBLEM] * 16, progress=kill)
        assert scores == [{"behave": Score(value=4.0)}] * 16
        assert runtime.num_nodes == 1
        assert wait_until(lambda: not any(map(alive, orphans)))
        assert score(runtime, "four") == [{"behave": Score(value=4.0)}]
        assert runtime.num_nodes == 2  # the node has a new one


def test_an_interruption_ends_the_work_and_the_next_call_works(cluster: Any, parts: Callable[..., Any]) -> None:
    with RemoteRuntimes(parts("behave"), **LIMITS) as runtime:

        def interrupt(done: int, total: int) -> None:
            if done:
                raise KeyboardInterrupt

        pids = workers_of(actor_pids(runtime))
        with pytest.raises(KeyboardInterrupt):
            runtime.score([completion("wait")] * 64, [PROBLEM] * 64, progress=interrupt)  # eight chunks of 1.6 s
        assert runtime.num_nodes < 2  # who was at work was ended; at most one had just finished
        assert wait_until(lambda: not all(map(alive, pids)))
        assert score(runtime, "a", "bb") == [{"behave": Score(value=1.0)}, {"behave": Score(value=2.0)}]
        with pytest.raises(ValueError, match="completion 0 of problem 'p' was given problem 'q'"):
            runtime.score([completion("a")], [Problem(id="q", prompt="", answer="")])
        assert runtime.score([], []) == []
    runtime.close()
    with pytest.raises(RuntimeError, match="closed"):
        score(runtime, "a")
    with pytest.raises(ValueError, match="cpu_s is 0"):
        RemoteRuntimes(parts("behave"), cpu_s=0)


def test_a_lost_node_is_left_out(cluster: Any, parts: Callable[..., Any]) -> None:
    """Last in this file: the node does not come back."""
    with RemoteRuntimes(parts("node"), **LIMITS) as runtime:
        assert {by_name["node"].value for by_name in score(runtime, *["x"] * 32)} == {1.0, 2.0}
        cluster.remove_node(next(node for node in cluster.list_all_nodes() if not node.is_head()))
        assert {by_name["node"].value for by_name in score(runtime, *["x"] * 32)} == {1.0}
        assert runtime.num_nodes == 1
