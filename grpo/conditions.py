"""What the bits of a run rest on beside its settings and its seed: kept with each checkpoint, compared when it is gone on with.

The same sums in another order are other numbers in their last digits, and sooner or later another token. The order depends on how
many threads share the work, on the kind of CPU, and on the libraries' versions. And a setting may name what is not in it: see
``grpo.inputs``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from grpo.config import Config, ConfigError, EngineName, Precision, ScheduleName
from grpo.inputs import changed as changed_inputs

Conditions = Mapping[str, str | int | bool]

PACKAGES = ("torch", "vllm", "transformers")  # whose arithmetic it is
REMEDIES = {
    "engine": "rollout.engine={}",
    "schedule": "rollout.schedule={}",
    "cpus_per_engine": "rollout.cpus_per_engine={}",
    "trainer_threads": "OMP_NUM_THREADS={} in front of the command",
    "ranks": "trainer.ranks={}",
    "device": "trainer.device={}",
    "precision": "model.precision={}",
    "cpu_instructions": "a machine whose CPU has {}",
}
TYPED = {"bfloat16": Precision.bf16, "float32": Precision.fp32}  # what a recipe calls what torch calls otherwise


def conditions(
    config: Config, *, cpus_per_engine: int, trainer_threads: int, device: str, precision: str, cpu_instructions: str
) -> Conditions:
    """What holds at this start; ``exact``: with such settings a run that is gone on with ends in the same bits."""
    rollout, ranks = config.rollout, config.trainer.ranks
    pooled = rollout.engine is EngineName.vllm
    in_order = rollout.max_staleness == 0 and (not pooled or rollout.schedule is ScheduleName.fixed)
    held: dict[str, str | int | bool] = {
        "exact": in_order and device == "cpu" and ranks == 1,
        "engine": rollout.engine.value,
        "trainer_threads": trainer_threads,
        "ranks": ranks,
        "device": device,
        "precision": precision,
        "cpu_instructions": cpu_instructions,
    }
    if pooled:
        held |= {"schedule": rollout.schedule.value, "cpus_per_engine": cpus_per_engine}  # not how many engines: see FixedHandout
    return held


def check_conditions(before: Mapping[str, Any], now: Mapping[str, Any], exact: bool) -> list[str]:
    """What has changed since the steps that a run goes on from were made, in words: conditions where its settings promise the same bits,
    inputs anywhere.

    Args:
        before: the environment of those steps: its ``conditions``, ``inputs``, ``packages`` and ``cpu`` are looked at.
        now: the present one.
        exact: refuse what changes the bits, where they are promised; else it is one of the warnings.

    Raises:
        ConfigError: a condition or an input is another: which, from what, to what, what to do.
    """
    then: Conditions = before.get("conditions", {})
    here: Conditions = now["conditions"]
    if not then and here["exact"]:
        return ["the record of what this run was started with (environment.json) is gone or damaged: from here on the bits may be others"]
    edited = changed_inputs(before.get("inputs", {}), now.get("inputs", {}))
    if not then.get("exact"):
        return [f"{sentence} since the steps that this run goes on from" for sentence in edited]
    changed = [name for name in REMEDIES if name in then and then[name] != here.get(name)]
    said = [f"{name} was {then[name]} and is {here.get(name)}" for name in changed] + list(edited)
    if said and exact:
        back = [_remedy(name, then[name]) for name in changed] + list(dict.fromkeys(edited.values()))
        raise ConfigError(
            "run.exact",
            f"this run would not go on to the same bits: {'; '.join(said)}",
            f"{', '.join(back)}; or go on all the same: run.exact=false",
        )
    old, new = before.get("packages", {}), now["packages"]
    versions = [(name, old.get(name), new.get(name)) for name in PACKAGES] + [("the CPU", before.get("cpu"), now.get("cpu"))]
    said += [f"{name} was {was} and is {present}" for name, was, present in versions if was != present]
    return [f"{sentence}: from here on the bits may be others" for sentence in said]


def _remedy(name: str, was: Any) -> str:
    back = REMEDIES[name].format(TYPED.get(was, was))
    if name == "trainer_threads" and "MKL_NUM_THREADS" in os.environ:  # torch, where it is built with MKL, asks that first
        return f"MKL_NUM_THREADS={was} {back}"
    return back
