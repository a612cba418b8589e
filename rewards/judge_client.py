"""Asking an OpenAI-compatible chat server, with patience and a memory. Standard library only; safe to use from many threads."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import random
import sqlite3
import threading
import time
import urllib.error
import urllib.request
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

_RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
_LONGEST_BACKOFF_S = 30.0
_LONGEST_RETRY_AFTER_S = 60.0
_MAX_REPLY_BYTES = 4 * 2**20
_REMEMBERED = 10_000  # replies that a process keeps in memory
_LOCK_S = 30.0  # how long one process waits for another that writes to the cache


class JudgeError(Exception):
    """The server gave no reply that can be used."""


class _Passing(JudgeError):
    """A failure that another attempt may not meet."""

    def __init__(self, message: str, retry_after_s: float | None = None, unreachable: bool = False) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.unreachable = unreachable


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """``Server(url="http://localhost:8000/v1/chat/completions", api_key_env=None, timeout_s=120, retries=5, backoff_s=0.5)``"""

    url: str
    api_key_env: str | None
    timeout_s: float  # of one attempt
    retries: int
    backoff_s: float


class ChatClient:
    """Replies of one server. What was asked before is not asked again, also not by two threads at once.

    Args:
        cache: an SQLite file that keeps the replies, or None.
    """

    def __init__(self, server: Server, cache: str | None = None) -> None:
        self._server = server
        self._remembered: OrderedDict[str, str] = OrderedDict()
        self._asking: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()
        self._unreachable = False
        self._store = None if cache is None else _Store(Path(cache).expanduser())
        self._random = random.Random()

    def begin_batch(self) -> None:
        """Believe in the server again, after it could not be reached."""
        self._unreachable = False

    def ask(self, request: Mapping[str, Any]) -> str:
        """The text of the reply to a chat request.

        Raises:
            JudgeError: there is none, after all attempts; the message says why.
        """
        body = json.dumps(request, sort_keys=True, ensure_ascii=True).encode()
        key = hashlib.sha256(body).hexdigest()
        with self._one_at_a_time(key):
            reply = self._recall(key)
            if reply is None:
                reply = self._patiently(body)
                self._remember(key, reply)
        return reply

    @contextlib.contextmanager
    def _one_at_a_time(self, key: str) -> Iterator[None]:
        with self._lock:
            lock = self._asking.setdefault(key, threading.Lock())
        with lock:
            try:
                yield
            finally:
                with self._lock:
                    self._asking.pop(key, None)

    def _recall(self, key: str) -> str | None:
        with self._lock:
            if key in self._remembered:
                self._remembered.move_to_end(key)
                return self._remembered[key]
        return None if self._store is None else self._store.get(key)

    def _remember(self, key: str, reply: str) -> None:
        with self._lock:
            self._remembered[key] = reply
            while len(self._remembered) > _REMEMBERED:
                self._remembered.popitem(last=False)
        if self._store is not None:
            self._store.put(key, reply)

    def _patiently(self, body: bytes) -> str:
        attempt = 0
        while True:
            try:
                reply = self._once(body)
                self._unreachable = False
                return reply
            except _Passing as failure:
                if attempt >= (0 if failure.unreachable and self._unreachable else self._server.retries):
                    self._unreachable = failure.unreachable
                    raise JudgeError(f"{failure} (attempt {attempt + 1}, the last)") from failure
                time.sleep(self._pause(attempt, failure.retry_after_s))
                attempt += 1

    def _pause(self, attempt: int, retry_after_s: float | None) -> float:
        if retry_after_s is not None:
            return min(retry_after_s, _LONGEST_RETRY_AFTER_S)
        return min(self._server.backoff_s * 2**attempt, _LONGEST_BACKOFF_S) * self._random.uniform(0.5, 1.0)

    def _once(self, body: bytes) -> str:
        headers = {"Content-Type": "application/json"}
        if self._server.api_key_env is not None:
            headers["Authorization"] = f"Bearer {os.environ.get(self._server.api_key_env, '')}"
        request = urllib.request.Request(self._server.url, data=body, headers=headers, method="POST")
        deadline = time.monotonic() + self._server.timeout_s
        try:
            with urllib.request.urlopen(request, timeout=self._server.timeout_s) as response:
                return _content(_read(response, deadline))
        except urllib.error.HTTPError as error:
            with error:
                excerpt = error.read(500).decode(errors="replace").strip()
            message = f"{self._server.url} answered with status {error.code}: {excerpt}"
            if error.code in _RETRIED:
                raise _Passing(message, _retry_after(error.headers.get("Retry-After"))) from error
            raise JudgeError(message) from error
        except TimeoutError as error:
            raise _Passing(f"{self._server.url} did not answer within {self._server.timeout_s:g} s") from error
        except urllib.error.URLError as error:
            raise _Passing(f"{self._server.url} cannot be reached: {error.reason}", unreachable=True) from error
        except (http.client.HTTPException, OSError) as error:
            raise _Passing(f"{self._server.url} broke off: {type(error).__name__}: {error}") from error


def _read(response: http.client.HTTPResponse, deadline: float) -> bytes:
    """The body, within the time that is left, however slowly it drips."""
    chunks = bytearray()
    while chunk := response.read1(1 << 16):
        chunks += chunk
        if len(chunks) > _MAX_REPLY_BYTES:
            raise JudgeError(f"the reply is longer than {_MAX_REPLY_BYTES} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError
    if response.length:  # what Content-Length promised and did not come
        raise http.client.IncompleteRead(bytes(chunks), response.length)
    return bytes(chunks)


def _content(body: bytes) -> str:
    try:
        content = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError) as error:
        raise JudgeError(f"the reply is no chat completion: {body[:200]!r}") from error
    if not isinstance(content, str):
        raise JudgeError(f"the reply has no text: {body[:200]!r}")
    return content


def _retry_after(value: str | None) -> float | None:
    """Seconds, from a header that gives seconds or a date."""
    if value is None:
        return None
    with contextlib.suppress(ValueError):
        return max(float(value), 0.0)
    with contextlib.suppress(ValueError, TypeError):
        return max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    return None


class _Store:
    """Replies in an SQLite file that processes share. A key is written once; the file may be deleted at any time between runs."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._connection = sqlite3.connect(path, timeout=_LOCK_S, check_same_thread=False, isolation_level=None)
        self._connection.execute("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT NOT NULL) WITHOUT ROWID")

    def get(self, key: str) -> str | None:
        with self._lock:
            row = self._connection.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
        return None if row is None else row[0]

    def put(self, key: str, reply: str) -> None:
        with self._lock:
            self._connection.execute("INSERT OR IGNORE INTO replies VALUES (?, ?)", (key, reply))
