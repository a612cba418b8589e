"""What the reward runtime and its workers say to each other: pickled messages, each behind its length."""

from __future__ import annotations

import pickle
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from grpo.imports import FunctionRef
from grpo.types import Score

_LENGTH = struct.Struct("!Q")


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Parent → worker, once: what to load and under which limits to run it."""

    refs: tuple[FunctionRef, ...]
    cpu_s: float
    memory_mb: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """Worker → parent, once: everything is loaded. ``timeout_values`` has one entry a function."""

    timeout_values: tuple[float, ...]
    cpu_clock: float  # seconds of CPU time the worker has used so far


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Parent → worker, in tuples: score one completion by these parts. The payload is pickled once and read in the worker's ``try``."""

    index: int
    parts: tuple[int, ...]
    payload: bytes  # pickle of (completion, problem)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Worker → parent: one part of one job is done. The CPU clock is where the next task's time starts."""

    index: int
    part: int
    score: Score
    cpu_clock: float


def encode(message: Any) -> bytes:
    body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return _LENGTH.pack(len(body)) + body


def decode(buffer: bytearray) -> Iterator[Any]:
    """The whole messages at the head of ``buffer``, which keeps the rest."""
    while len(buffer) >= _LENGTH.size:
        end = _LENGTH.size + _LENGTH.unpack_from(buffer)[0]
        if len(buffer) < end:
            return
        body = bytes(buffer[_LENGTH.size : end])
        del buffer[:end]
        yield pickle.loads(body)


def receive(channel: socket.socket) -> Any:
    """Wait for one message.

    Raises:
        EOFError: the other side is gone.
    """
    return pickle.loads(_read(channel, _LENGTH.unpack(_read(channel, _LENGTH.size))[0]))


def _read(channel: socket.socket, size: int) -> bytes:
    chunks = bytearray()
    while len(chunks) < size:
        chunk = channel.recv(min(size - len(chunks), 1 << 20))
        if not chunk:
            raise EOFError
        chunks += chunk
    return bytes(chunks)
