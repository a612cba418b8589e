"""Weights from process to process by torch.distributed: what becomes of the trainer when an engine dies, at each place where it can."""

from __future__ import annotations

import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist

from grpo.rollouts import peer
from grpo.rollouts.peer import PeerToPeer

WAIT = 60  # seconds in which a test gives up


@pytest.fixture(autouse=True)
def address(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")


@contextmanager
def running(backend: str = "gloo", timeout: float = 20) -> Iterator[PeerToPeer]:
    transfer = PeerToPeer(backend, timeout)
    try:
        yield transfer
    finally:
        transfer.close()


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def weights(value: float, size: int = 1000, device: str = "cpu") -> dict[str, torch.Tensor]:
    return {"a": torch.full((size,), value, device=device), "b": torch.full((3, 5), 2 * value, dtype=torch.bfloat16, device=device)}


def opens_as(parcel: Any, value: float) -> bool:
    opened = parcel.open()
    return list(opened) == ["a", "b"] and all(torch.equal(opened[name], tensor) for name, tensor in weights(value).items())


def test_the_trainer_keeps_no_parcel_that_is_discarded() -> None:
    with running() as transfer:
        parcel: Any = transfer.send(weights(1.0))
        kept = weakref.ref(transfer._kept[parcel.number])
        assert opens_as(parcel, 1.0)
        transfer.discard([parcel])
        until(lambda: gc.collect() >= 0 and kept() is None)
        with pytest.raises(RuntimeError, match=r"no longer has the weights that this engine was told to load \(parcel 0\)"):
            parcel.open()


def test_no_connection_is_begun_with_an_engine_that_died_waiting_for_its_turn(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """NCCL would wait in it for ever."""
    begun: list[str] = []
    group = peer._Place.group

    def begin(self: Any, store: Any, line: str, rank: int) -> Any:
        begun.append(line)
        return group(self, store, line, rank)

    monkeypatch.setattr(peer._Place, "group", begin)
    with running(timeout=0.5) as transfer:
        parcel: Any = transfer.send(weights(1.0))
        transfer._store.queue_push(peer._REQUESTS, f"dead {parcel.number}")
        until(lambda: "did not reach its engine" in caplog.text)
        assert begun == []
        assert opens_as(parcel, 1.0), "another engine's turn"


def test_an_engine_whose_connection_broke_asks_by_a_new_one(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    group, breaks = peer._Place.group, [1]

    class Broken:
        def recv(self, *arguments: Any) -> Any:
            raise RuntimeError("Connection reset by peer")

    def breaks_once(self: Any, store: Any, line: str, rank: int) -> Any:
        if rank in breaks:
            breaks.remove(rank)
            return Broken()
        return group(self, store, line, rank)

    monkeypatch.setattr(peer._Place, "group", breaks_once)
    with running(timeout=2) as transfer:
        parcels = [transfer.send(weights(float(i))) for i in range(2)]
        with pytest.raises(RuntimeError, match="Connection reset by peer"):
            parcels[0].open()
        until(lambda: "did not reach its engine" in caplog.text)
        assert opens_as(parcels[1], 1.0) and opens_as(parcels[0], 0.0)


def test_closing_does_not_wait_for_ever_for_a_connection_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    entered, release = threading.Event(), threading.Event()

    def hang(self: Any, store: Any, line: str, rank: int) -> Any:
        entered.set()
        release.wait(2 * WAIT)
        raise RuntimeError("released")

    monkeypatch.setattr(peer._Place, "group", hang)
    transfer = PeerToPeer("gloo", timeout=0.5)
    try:
        parcel: Any = transfer.send(weights(1.0))
        transfer._store.queue_push("engine" + peer._READY, "")
        transfer._store.queue_push(peer._REQUESTS, f"engine {parcel.number}")
        assert entered.wait(WAIT)
        closing = threading.Thread(target=transfer.close, daemon=True)
        closing.start()
        closing.join(WAIT)
        assert not closing.is_alive()
    finally:
        release.set()
        transfer._answering.join(WAIT)


def test_nccl_is_told_to_block_before_a_group_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise PyTorch's watchdog ends the trainer when an engine dies."""
    seen: list[str | None] = []

    class Group:
        class Options:
            pass

        def __init__(self, *arguments: Any) -> None:
            seen.append(os.environ.get("TORCH_NCCL_BLOCKING_WAIT"))

    monkeypatch.setenv("TORCH_NCCL_BLOCKING_WAIT", "0")
    monkeypatch.setattr(dist, "ProcessGroupNCCL", Group, raising=False)
    peer._Place("127.0.0.1", 0, "nccl", 1.0).group(dist.HashStore(), "line", 0)
    assert seen == ["1"]


ENGINE = """
import os, pickle, signal, sys
from types import SimpleNamespace
from grpo.rollouts import peer
first, second = pickle.load(sys.stdin.buffer)
first.open()
line = peer._line(first.place)
group = line._group  # the connection stands until the process is gone
line._group = SimpleNamespace(recv=lambda *_: os.kill(os.getpid(), signal.SIGKILL))
second.open()
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["gloo", pytest.param("nccl", marks=pytest.mark.gpu)])
def test_an_engine_that_is_killed_with_a_parcel_under_way_takes_no_other_with_it(backend: str) -> None:
    if backend == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip("NCCL does not connect two processes on one GPU")
    device = "cuda:0" if backend == "nccl" else "cpu"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "1"} if backend == "nccl" else None
    with running(backend, timeout=5) as transfer:
        parcels = [transfer.send(weights(float(i), 10_000_000, device)) for i in range(3)]
        for pair in (parcels[:2], parcels[1:]):  # the second one replaces the first
            engine = subprocess.run(
                [sys.executable, "-c", ENGINE], input=pickle.dumps(pair), capture_output=True, timeout=2 * WAIT, env=environment
            )
            assert engine.returncode == -signal.SIGKILL, engine.stderr.decode()[-2000:]
            assert float(torch.ones(3, device=device).sum()) == 3, "the trainer's own stream goes on"
        assert transfer._answering.is_alive()


@pytest.mark.gpu
def test_what_a_parcel_waits_for_does_not_hold_up_the_trainers_stream() -> None:
    streams: list[torch.cuda.Stream] = []

    class Group:
        def send(self, *arguments: Any) -> Any:
            streams.append(torch.cuda.current_stream())
            return self

        def wait(self) -> None:
            pass

    peer._send(Group(), torch.zeros(1, device="cuda"))
    assert streams[0] != torch.cuda.default_stream()
