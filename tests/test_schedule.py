"""Who samples what (``grpo.rollouts.schedule``), and that under the fixed schedule it does not matter how many engines there are."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from grpo.config import RolloutConfig
from grpo.models import resolve_model
from grpo.parts import warn_of_idle_engines
from grpo.recipe import load_recipe
from grpo.rollouts.base import Job, jobs_of
from grpo.rollouts.hf import HFEngine
from grpo.rollouts.pool import EnginePool, start_ray, stop_ray
from grpo.rollouts.schedule import FixedHandout, FreeHandout, Schedule, make_handout
from grpo.rollouts.vllm import VLLMEngine
from grpo.types import Completion, Request, Sampling

sizes = st.lists(st.integers(1, 9), max_size=12)


def jobs_for(sizes: Sequence[int]) -> list[Job]:
    return jobs_of([Request(problem_id=str(i), prompt_ids=(1,), num_completions=size, seed=i) for i, size in enumerate(sizes)])


@given(deals=st.lists(sizes, max_size=3), num_engines=st.integers(1, 5), schedule=st.sampled_from(Schedule), data=st.data())
def test_every_job_is_finished_whoever_dies(deals: list[list[int]], num_engines: int, schedule: Schedule, data: st.DataObject) -> None:
    """Jobs come, engines take, finish and die in any order: everything is handed out until it is finished, nothing to two at a time."""
    jobs = jobs_for([size for deal in deals for size in deal])
    coming = [jobs[sum(map(sum, deals[:place])) :][: sum(deal)] for place, deal in enumerate(deals)]
    handout, held, done = make_handout(schedule, num_engines, slots=3), [set[Job]() for _ in range(num_engines)], list[Job]()
    deaths = 0
    while coming or handout.open:
        if coming and (not handout.open or data.draw(st.booleans())):
            handout.add(coming.pop(0))
        engine = data.draw(st.integers(0, num_engines - 1))
        if held[engine] and deaths < 6 and data.draw(st.booleans()):
            deaths += 1
            again = handout.lose(engine)
            assert held[engine] <= set(again)
            if schedule is Schedule.free:
                assert held[engine] == set(again)
            assert not any(handout.finish(engine, job.number) for job in held[engine]), "what a dead engine still says counts for nothing"
            held[engine] = set()
        elif held[engine] and data.draw(st.booleans()):
            job = held[engine].pop()
            if handout.finish(engine, job.number):
                done.append(job)
            assert not handout.finish(engine, job.number)
        elif not (handout.exact and held[engine]):
            taken = handout.take(engine, slots=3, able=num_engines)
            assert not set(taken) & set().union(*held)
            held[engine] |= set(taken)
            assert any(held) or not handout.open, "work is left, nobody holds any, and who asks is given none"
        assert set(handout.open.values()) == set(jobs) - set(done) - {job for deal in coming for job in deal}
    assert sorted(job.number for job in done) == [job.number for job in jobs]


@given(deals=st.lists(sizes, max_size=3), num_engines=st.integers(1, 5), slots=st.integers(1, 20))
def test_fixed_shards_depend_on_what_came_together_and_an_engines_slots_alone(deals: list[list[int]], num_engines: int, slots: int) -> None:
    """Whole groups, in order, about as many as an engine samples at once, whoever takes them; a shard is done again as a whole."""
    handout = FixedHandout(num_engines, slots)
    for deal in deals:
        jobs = jobs_for(deal)
        handout.add(jobs)
        alone = FixedHandout(1, slots)
        alone.add(jobs)
        given, turn = list[list[Job]](), 0
        while handout.open:
            engine = turn % num_engines
            turn += 1
            shard = handout.take(engine, slots=99, able=num_engines)
            given.append(shard)
            for job in shard[:-1]:
                assert handout.finish(engine, job.number)
            assert handout.take(engine, slots=99, able=1) == []
            assert handout.lose(engine) == shard
            assert handout.take(engine, slots=99, able=1) == shard
            assert [handout.finish(engine, job.number) for job in shard] == [False] * (len(shard) - 1) + [True], "each counts once"
            assert alone.take(0, slots=99, able=1) == shard, "one engine is given the same"
            for job in shard:
                alone.finish(0, job.number)
        assert [job for shard in given for job in shard] == jobs
        assert all(shard and shard[0].index == 0 for shard in given), "no group is cut"
        assert len(given) <= -(-len(jobs) // slots)
        assert all(len(shard) < slots + max(deal) for shard in given)


@pytest.mark.parametrize(
    ("problems", "samples", "engines", "slots", "advice"),
    [
        (16, 8, 2, 256, 64),  # 128 completions are one shard
        (16, 8, 2, 64, None),
        (16, 8, 1, 256, None),
        (2, 64, 4, 128, 64),  # two groups: more than two engines cannot have work
        (2, 64, 4, 64, None),
    ],
)
def test_engines_that_will_have_no_work_are_told_of(problems: int, samples: int, engines: int, slots: int, advice: int | None) -> None:
    rollout = RolloutConfig(problems_per_step=problems, completions_per_problem=samples, num_engines=engines)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_idle_engines(rollout, slots)
    said = [str(warning.message).rpartition("→ ")[2] for warning in caught]
    assert said == ([] if advice is None else [f"rollout.engine_args.max_num_seqs={advice}"])


def test_free_engines_get_an_equal_share_and_then_what_they_have_room_for() -> None:
    handout = FreeHandout(num_engines=3)
    handout.add(jobs_for([4] * 6))  # 24 jobs: a share is 8
    first, second = handout.take(0, slots=100, able=3), handout.take(1, slots=5, able=3)
    assert [job.number for job in first] == list(range(8))
    assert [job.number for job in second] == [8, 9, 10, 11, 12]
    assert handout.take(1, slots=5, able=3) == []
    handout.finish(1, 8)
    assert [job.number for job in handout.take(1, slots=5, able=3)] == [13]
    assert handout.take(0, slots=100, able=3) == [], "23 are out: the share is still 8"
    assert [job.number for job in handout.take(0, slots=100, able=2)] == [14, 15, 16, 17], "of two it is 12"
    handout.add([Job(100 + job.number, job.request, job.index) for job in jobs_for([6])])  # 6 wait, and 23 + 6 = 29: a share is 10
    assert [job.number for job in handout.take(2, slots=100, able=3)] == [18, 19, 20, 21, 22, 23, 100, 101, 102, 103]
    alone = FreeHandout(num_engines=1)
    alone.add(jobs_for([4] * 6))
    assert len(alone.take(0, slots=5, able=1)) == 24, "one engine alone waits for nobody"


# --- in processes ---


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    start_ray(num_cpus=4, object_store_memory=100_000_000)
    yield
    stop_ray()


def sampled(num_engines: int, slots: int, asked: list[Request], **settings: Any) -> list[Completion]:
    pool = EnginePool(num_engines=num_engines, schedule=Schedule.fixed, **settings)
    try:
        assert pool.slots == slots
        return pool.generate(asked, Sampling(max_new_tokens=24))
    finally:
        pool.close()


def asked_of(model: str, lengths: Sequence[int]) -> list[Request]:
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = (" ".join(["What is", *["1 +"] * length]) for length in lengths)
    return [Request(problem_id=str(i), prompt_ids=tuple(tokenizer.encode(p)), num_completions=4, seed=i) for i, p in enumerate(prompts)]


@pytest.mark.slow
def test_under_the_fixed_schedule_the_number_of_engines_changes_no_bit(ray_cluster: None, tiny_model: str) -> None:
    """In bfloat16, where company shows: shards of another size give other log-probs, or this would be no test."""

    def by(num_engines: int, slots: int) -> list[Completion]:
        kwargs = {"model": tiny_model, "dtype": "bfloat16", "batch_size": slots}
        asked = asked_of(tiny_model, range(9))
        return sampled(num_engines, slots, asked, cpus_per_engine=1, factory=HFEngine, kwargs=kwargs)

    one = by(1, slots=12)
    assert by(3, slots=12) == one
    assert by(1, slots=4) != one


@pytest.mark.full
def test_under_the_fixed_schedule_the_number_of_vllm_engines_changes_no_bit(ray_cluster: None) -> None:
    """With the model of the main recipe, prompts of some hundred tokens and two threads: company shows in vLLM's attention alone."""
    model = resolve_model(load_recipe("r1_zero_arithmetic").model.path)
    asked = asked_of(model, range(40, 80, 4))

    def by(num_engines: int, slots: int) -> list[Completion]:
        arguments = {"kv_cache_memory_bytes": 128 << 20, "max_num_seqs": slots}
        kwargs = {"model_path": model, "max_model_len": 512, "engine_args": arguments}
        return sampled(num_engines, slots, asked, cpus_per_engine=2, factory=VLLMEngine, kwargs=kwargs)

    one = by(1, slots=20)
    assert by(2, slots=20) == one
    assert by(1, slots=4) != one
