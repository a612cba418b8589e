"""What every test file shares: no network, the order (quick tests first), the skip of GPU tests, the tiny model."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before anything imports these libraries: they read the environment once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # several processes share few cores here: threads that spin take them from one another

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from grpo.rollouts.base import Engine

    from .workshop import Workshop

# Their asserts are to say what they compared, like those of the test files.
pytest.register_assert_rewrite("tests.counted_rollouts", "tests.engine_checks")

settings.register_profile(
    "grpo",
    deadline=None,  # the machine may be busy: a slow example is not a failure
    derandomize="CI" in os.environ,  # CI must not fail on the luck of the draw; at home, keep searching
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("grpo")

# A shell has what it runs in the background ignore SIGINT, and children inherit that: a test of Ctrl-C would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: (item.get_closest_marker("full") is not None) * 2 + (item.get_closest_marker("slow") is not None))
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu and not _has_gpu():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU; torch.cuda.is_available() is False here"))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout these tests stand in."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of the million-parameter model with the character tokenizer; do not write into it."""
    from grpo.models import resolve_model

    return resolve_model("make:grpo.tiny.digits_model", cache_dir=str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory, tiny_model: str) -> Iterator[Workshop]:
    """Runs that can be killed."""
    from .killable_runs import Runs
    from .workshop import Workshop

    folder = tmp_path_factory.mktemp("resume")
    runs = Runs(folder)
    yield Workshop(folder, tiny_model, runs)
    runs.close()


@pytest.fixture(scope="session")
def tokenizer(tiny_model: str) -> Any:
    """Of the tiny model."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """A model this small only loses by a second thread, and on a busy machine it loses a hundredfold."""
    import torch

    set_num_threads, before = torch.set_num_threads, torch.get_num_threads()  # vLLM's CPU build replaces the function
    set_num_threads(1)
    yield
    torch.set_num_threads = set_num_threads
    set_num_threads(before)


@pytest.fixture(scope="module")
def vllm_engine(tiny_model: str) -> Iterator[Engine]:
    """Started once: it takes ten seconds."""
    from grpo.rollouts.vllm import VLLMEngine

    from .engine_checks import SHORT

    engine = VLLMEngine(tiny_model, dtype="float32", max_model_len=128, engine_args={"kv_cache_memory_bytes": 64 << 20})
    yield engine
    engine.close()
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        engine.generate([], SHORT)


@pytest.fixture(scope="module")
def hf_engine(tiny_model: str) -> Iterator[Engine]:
    from grpo.rollouts.hf import HFEngine

    engine = HFEngine(tiny_model, dtype="float32")
    yield engine
    engine.close()
    engine.close()


@pytest.fixture(scope="module")
def toy_tasksets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """tests/tasksets, installed. Starting a tool server takes seconds: the tests of a file share what verifiers has running."""
    from grpo.rollouts.verifiers_episodes import VerifiersTask

    folder = tmp_path_factory.mktemp("tasksets")  # outside the checkout: verifiers takes what has a pyproject.toml above it for a project
    shutil.copytree(Path(__file__).with_name("tasksets"), folder, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]))
        yield folder
        VerifiersTask.close_shared()
    for file in folder.glob("*.py"):
        sys.modules.pop(file.stem, None)
