"""verifiers' event loop, in a thread that all rollouts of the process share, and the endpoint that its model calls come to."""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from grpo.rewards.verifiers import COLUMN, roles_of, task_of
from grpo.rollouts.verifiers_episodes.conversation import Conversation, End, Reply
from grpo.types import Problem

HARNESS = "grpo_in_process"  # verifiers finds plugins by the names of modules, which may have no dots
_MODEL = "policy"
_TO_CLOSE_S = 60  # verifiers gives each of its servers some seconds


class Server:
    """``begin`` and ``close`` may be called from any thread; ``begin`` starts the loop when it is needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards the thread's coming and going
        self._running: tuple[threading.Thread, Loop] | None = None

    def begin(self, problem: Problem, agent: Mapping[str, Any]) -> Conversation:
        """A rollout of the problem's task, under way."""
        with self._lock:
            if self._running is None:
                self._running = _started()
            return self._running[1].begin(problem, agent)

    def close(self) -> None:
        """End every rollout, and verifiers' servers with it."""
        with self._lock:
            running, self._running = self._running, None
            if running is not None:
                thread, loop = running
                loop.close()
                thread.join(_TO_CLOSE_S)


def _started() -> tuple[threading.Thread, Loop]:
    ready: queue.SimpleQueue[Loop | BaseException] = queue.SimpleQueue()
    thread = threading.Thread(target=lambda: asyncio.run(_main(ready.put)), name="verifiers", daemon=True)
    thread.start()
    loop = ready.get()
    if isinstance(loop, BaseException):
        raise loop
    return thread, loop


async def _main(ready: Callable[[Loop | BaseException], None]) -> None:
    try:
        sys.modules[HARNESS] = importlib.import_module("grpo.rollouts.verifiers_episodes.harness")
        _only_errors(logging.getLogger("verifiers"))
        loop = Loop()
        endpoint = await loop.open()
    except BaseException as error:
        ready(error)
        return
    ready(loop)
    await loop.until_closed()
    await endpoint.cleanup()


class Loop:
    """What happens on one event loop, the running one. ``begin`` and ``close`` are for other threads."""

    def __init__(self) -> None:
        self.url = ""
        self.rollouts: dict[Conversation, asyncio.Task[None]] = {}
        self._loop, self._closing = asyncio.get_running_loop(), asyncio.Event()
        self._calling: dict[str, Conversation] = {}  # by the ids of their traces, which model calls carry
        self._served: dict[str, tuple[asyncio.Future[Any], asyncio.Task[None]]] = {}

    def begin(self, problem: Problem, agent: Mapping[str, Any]) -> Conversation:
        conversation = Conversation(self._loop, self._give_up)
        self._loop.call_soon_threadsafe(self._start, conversation, problem, agent)
        return conversation

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._closing.set)

    # --- on the loop ---

    async def open(self) -> Any:
        """The endpoint."""
        from aiohttp import web

        app = web.Application(client_max_size=2**30)
        app.router.add_post("/v1/chat/completions", self._complete)
        endpoint = web.AppRunner(app, access_log=None, shutdown_timeout=1)
        await endpoint.setup()
        await web.TCPSite(endpoint, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{endpoint.addresses[0][1]}/v1"
        return endpoint

    async def until_closed(self) -> None:
        """Ends with every rollout and every taskset's servers."""
        await self._closing.wait()
        rollouts, served = list(self.rollouts.values()), list(self._served.values())
        for rollout in rollouts:
            rollout.cancel()
        await asyncio.gather(*rollouts, return_exceptions=True)
        for env, serving in served:
            if not env.done():  # what serves ends by itself; what is still being started may never come so far
                serving.cancel()
        await asyncio.gather(*(serving for _, serving in served), return_exceptions=True)

    def _start(self, conversation: Conversation, problem: Problem, agent: Mapping[str, Any]) -> None:
        self.rollouts[conversation] = asyncio.create_task(self._run(conversation, problem, agent))

    def _give_up(self, conversation: Conversation) -> None:
        if conversation in self.rollouts:
            self.rollouts[conversation].cancel()

    async def _run(self, conversation: Conversation, problem: Problem, agent: Mapping[str, Any]) -> None:
        def met(trace: Any) -> None:
            if conversation.trace is not None:
                raise ValueError("the taskset's Env runs its agent more than once, and a rollout is one conversation")
            conversation.trace = trace
            self._calling[trace.id] = conversation

        try:
            task = task_of(problem)
            env = await self._env(problem.columns[COLUMN], agent)
            episode = await env.run_episode(task, self._model(), on_trace=met)
            errors = [*episode.errors, *(conversation.trace.errors if conversation.trace else ())]
            said = tuple(error.traceback or f"{error.type}: {error.message}" for error in errors)
            conversation.end(End(conversation.trace, episode.ok, said))
        except asyncio.CancelledError:
            conversation.put(RuntimeError("verifiers' rollout was given up"))
            raise
        except BaseException as error:
            conversation.put(error)
        finally:
            conversation.close()
            del self.rollouts[conversation]
            if conversation.trace is not None:
                del self._calling[conversation.trace.id]

    def _model(self) -> Any:
        from verifiers.v1 import ModelContext
        from verifiers.v1.clients import EvalClientConfig

        return ModelContext(model=_MODEL, client=EvalClientConfig(base_url=self.url, api_key_var="GRPO_NEEDS_NO_API_KEY"))

    async def _env(self, made_by: Mapping[str, Any], agent: Mapping[str, Any]) -> Any:
        """verifiers' ``Env`` of a taskset, serving the tools that its rollouts share."""
        key = json.dumps([made_by["taskset"], made_by["settings"], agent], sort_keys=True)
        if key not in self._served:
            future = self._loop.create_future()
            self._served[key] = future, asyncio.create_task(self._serve(key, made_by, agent, future))
        served, _ = self._served[key]
        await asyncio.wait([served])
        if error := served.exception():  # of all rollouts that waited: each raises one of its own
            raise RuntimeError(f"verifiers could not serve the taskset {made_by['taskset']!r}: {error}") from error
        return served.result()

    async def _serve(self, key: str, made_by: Mapping[str, Any], agent: Mapping[str, Any], served: asyncio.Future[Any]) -> None:
        """Serve until the end: what is begun in a task must be ended in it."""
        from verifiers.v1.utils.loaders import load_environment, resolve_env_config

        try:
            (role,) = roles_of(made_by["taskset"])
            taskset = {**made_by["settings"], "id": made_by["taskset"]}
            acting = {"harness": {"id": HARNESS}, "runtime": {"type": "subprocess"}, **agent}
            env = load_environment(resolve_env_config({"taskset": taskset, role: acting}))
            async with env.serving():
                served.set_result(env)
                await self._closing.wait()
        except asyncio.CancelledError:
            served.cancel()
            raise
        except BaseException as error:
            if served.done():
                raise
            served.set_exception(error)
        finally:
            del self._served[key]  # the next rollout tries anew

    async def _complete(self, request: Any) -> Any:
        """``POST /v1/chat/completions``"""
        from aiohttp import web
        from verifiers.v1.clients.client import SESSION_ID_HEADER

        body = await request.json()
        conversation = self._calling.get(request.headers.get(SESSION_ID_HEADER, ""))
        reply = await conversation.reply(body) if conversation is not None else None
        if reply is None:
            return web.json_response({"error": {"message": "the policy says no more in this rollout"}}, status=400)
        if body.get("stream"):
            return web.Response(text=events(reply), content_type="text/event-stream")
        return web.json_response(completion(reply))


def completion(reply: Reply) -> dict[str, Any]:
    """As a ``chat.completion``."""
    choice = {"index": 0, "message": reply.message, "finish_reason": reply.finish_reason}
    return {**_head("chat.completion"), "choices": [choice], "usage": _usage(reply)}


def events(reply: Reply) -> str:
    """The same for a harness that wants a stream, in one piece."""
    delta = reply.message
    if reply.calls:
        delta["tool_calls"] = [{"index": i, **call} for i, call in enumerate(delta["tool_calls"])]
    said = {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
    ended = {"choices": [{"index": 0, "delta": {}, "finish_reason": reply.finish_reason}]}
    chunks = [_head("chat.completion.chunk") | chunk for chunk in (said, ended, {"choices": [], "usage": _usage(reply)})]
    return "".join(f"data: {event}\n\n" for event in (*map(json.dumps, chunks), "[DONE]"))


def _head(kind: str) -> dict[str, Any]:
    return {"id": "turn", "object": kind, "created": int(time.time()), "model": _MODEL}


def _usage(reply: Reply) -> dict[str, int]:
    prompt, said = reply.prompt_tokens, reply.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": said, "total_tokens": prompt + said}


def _only_errors(logger: logging.Logger) -> None:
    """verifiers warns of every call that is refused. Whoever has set a level for it gets that."""
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.ERROR)


SERVER = Server()
