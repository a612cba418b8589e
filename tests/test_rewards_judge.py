"""The judge reward, against a real HTTP server that misbehaves."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.rewards import judge as judge_module
from grpo.rewards.base import parse_reward_config
from grpo.rewards.judge import SCORE, TEMPLATE, Rule, fill, judge
from grpo.rewards.runtime import RewardRuntime
from grpo.types import Completion, FinishReason, Outcome, Problem, Score

Reply = Callable[[BaseHTTPRequestHandler, dict[str, Any]], None]


def says(text: str | None, status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
    body = json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}) if status == 200 else str(text)
    return sends(body.encode(), status, headers)


def sends(body: bytes, status: int = 200, headers: Mapping[str, str] | None = None, length: int | None = None) -> Reply:
    def reply(handler: BaseHTTPRequestHandler, request: dict[str, Any]) -> None:
        handler.send_response(status)
        for name, value in (headers or {}).items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(body) if length is None else length))
        handler.end_headers()
        handler.wfile.write(body)

    return reply


def hangs(seconds: float) -> Reply:
    def reply(handler: BaseHTTPRequestHandler, request: dict[str, Any]) -> None:
        time.sleep(seconds)

    return reply


def drips(handler: BaseHTTPRequestHandler, request: dict[str, Any]) -> None:
    """A byte every 0.05 s: no single wait is long."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(60):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


def resets(handler: BaseHTTPRequestHandler, request: dict[str, Any]) -> None:
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close with RST
    handler.connection.close()


class Server:
    """Replies by a script, the last one for ever; remembers what it was asked and when."""

    def __init__(self) -> None:
        self.script: list[Reply] = [says("Fine.\nScore: 7")]
        self.requests: list[dict[str, Any]] = []
        self.headers: list[Mapping[str, str]] = []
        self.times: list[float] = []
        lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    reply = server.script[min(len(server.requests), len(server.script) - 1)]
                    server.requests.append({**request, "path": self.path})
                    server.headers.append(dict(self.headers))
                    server.times.append(time.monotonic())
                try:
                    reply(self, request)
                except (BrokenPipeError, ConnectionResetError):
                    pass  # the client gave up

            def log_message(self, *arguments: Any) -> None:
                pass

            def finish(self) -> None:
                try:
                    super().finish()
                except (OSError, ValueError):
                    pass  # we reset the connection

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()


@pytest.fixture
def server() -> Iterator[Server]:
    judge_module._client.cache_clear()  # ports are used again
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def completions(*texts: str) -> list[Completion]:
    return [
        Completion(
            problem_id="p",
            index=index,
            prompt_ids=(1,),
            token_ids=(),
            text=text,
            logprobs=(),
            policy_versions=(),
            finish_reason=FinishReason.stop,
        )
        for index, text in enumerate(texts)
    ]


PROBLEM = Problem(id="p", prompt="What is {1 + 1}?", answer="{2}", columns={"question": "1 + 1"})


def ask(server: Server, *texts: str, **arguments: Any) -> list[Score]:
    settings = {"base_url": server.url, "model": "m", "backoff_s": 0.01, "timeout_s": 5.0, **arguments}
    return judge(completions(*texts), [PROBLEM] * len(texts), **settings)


# ---------------------------------------------------------------- asking


def test_marks_become_a_share(server: Server) -> None:
    (score,) = ask(server, "<think>hm</think>It is 2.", extra={"seed": 3}, max_tokens=99)
    assert score == Score(value=0.7, detail="Fine.\nScore: 7")
    (request,) = server.requests
    assert request["path"] == "/v1/chat/completions"
    assert {name: request[name] for name in ("model", "temperature", "max_tokens", "seed")} == {
        "model": "m",
        "temperature": 0.0,
        "max_tokens": 99,
        "seed": 3,
    }
    (message,) = request["messages"]
    assert message["role"] == "user"
    assert "What is {1 + 1}?" in message["content"] and "{2}" in message["content"] and "\nIt is 2.\n" in message["content"]
    assert "hm" not in message["content"].replace("the", "")  # the thinking is not shown


def test_the_question_may_be_a_column(server: Server) -> None:
    ask(server, "2", question="question", template="{question}|{completion}")
    assert server.requests[0]["messages"][0]["content"] == "1 + 1|2"


def test_a_missing_part_is_not_asked_about(server: Server) -> None:
    (score,) = ask(server, "no answer tag", part="answer")
    assert (score.value, score.outcome, score.detail) == (0.0, Outcome.wrong_format, "no answer part")
    assert server.requests == []


def test_scores_keep_their_order_and_requests_their_limit(server: Server) -> None:
    lock, asked, most = threading.Lock(), 0, 0

    def marks(handler: BaseHTTPRequestHandler, request: dict[str, Any]) -> None:
        nonlocal asked, most
        with lock:
            asked += 1
            most = max(most, asked)
        number = int(request["messages"][0]["content"])
        time.sleep(0.002 * (20 - number))
        with lock:
            asked -= 1  # before the reply: the next request may come as soon as that is sent
        says(f"Score: {number}")(handler, request)

    server.script = [marks]
    scores = ask(server, *(str(number) for number in range(20)), template="{completion}", high=20, concurrency=4)
    assert [score.value for score in scores] == [number / 20 for number in range(20)]
    assert 1 < most <= 4


def test_the_key_comes_from_the_environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret")
    ask(server, "2", api_key_env="JUDGE_KEY")
    assert server.headers[0]["Authorization"] == "Bearer secret"


# ---------------------------------------------------------------- misbehaviour


@pytest.mark.parametrize(
    "trouble",
    [
        [says("slow down", 429), says("slow down", 429)],
        [says("oops", 500), says("bad gateway", 502), says("later", 503)],
        [resets, resets],
        [sends(b'{"choices"', length=500)],  # closes before all of it has come
        [hangs(1.0)],
        [drips],
    ],
    ids=["429 twice", "500 502 503", "reset", "cut off", "slow", "dripping"],
)
def test_what_passes_is_waited_out(server: Server, trouble: list[Reply]) -> None:
    server.script = [*trouble, says("Score: 10")]
    (score,) = ask(server, "2", timeout_s=0.4)
    assert score.value == 1.0
    assert len(server.requests) == len(trouble) + 1


def test_retry_after_is_heeded(server: Server) -> None:
    server.script = [says("wait", 429, {"Retry-After": "0.6"}), says("Score: 1")]
    ask(server, "2")
    assert server.times[1] - server.times[0] >= 0.6


def test_pauses_grow(server: Server) -> None:
    """0.1, 0.2, 0.4 s, each between half and all of it."""
    server.script = [says("no", 503)]
    ask(server, "2", retries=3, backoff_s=0.1)
    pauses = [after - before for before, after in zip(server.times, server.times[1:], strict=False)]
    assert len(pauses) == 3
    assert all(pause >= least for pause, least in zip(pauses, (0.05, 0.1, 0.2), strict=True))


@pytest.mark.parametrize(
    ("reply", "attempts", "detail"),
    [
        (says("down", 500), 3, "answered with status 500: down (attempt 3, the last)"),
        (hangs(1.0), 3, "did not answer within 0.2 s (attempt 3, the last)"),
        (resets, 3, "broke off"),
        (says("no such model", 404), 1, "answered with status 404: no such model"),
        (says("bad key", 401), 1, "answered with status 401: bad key"),
        (sends(b"<html>garbage</html>"), 1, "the reply is no chat completion: b'<html>"),
        (sends(b"\xff\xfe\x00"), 1, "the reply is no chat completion"),
        (sends(b'{"choices": []}'), 1, "the reply is no chat completion"),
        (sends(b"[]"), 1, "the reply is no chat completion"),
        (says(None), 1, "the reply has no text"),
        (says("I like it."), 1, "no score in the verdict: 'I like it.'"),
        (says("Score: 11"), 1, "11 is not from 0 to 10"),
        (says("Score: -1"), 1, "-1 is not from 0 to 10"),
        (says("<think>Score: 9</think>"), 1, "no score in the verdict"),
        (says(""), 1, "no score in the verdict"),
    ],
)
def test_without_a_verdict_a_completion_is_unscored_never_zero(server: Server, reply: Reply, attempts: int, detail: str) -> None:
    server.script = [reply]
    (score,) = ask(server, "2", retries=2, timeout_s=0.2)
    assert math.isnan(score.value) and score.outcome is Outcome.error
    assert detail in score.detail
    assert len(server.requests) == attempts


def test_one_failure_is_its_own(server: Server) -> None:
    def fussy(handler: BaseHTTPRequestHandler, request: dict[str, Any]) -> None:
        reply = says("bad", 400) if request["messages"][0]["content"] == "b" else says("Score: 5")
        reply(handler, request)

    server.script = [fussy]
    assert [score.outcome for score in ask(server, "a", "b", "c", template="{completion}")] == [Outcome.ok, Outcome.error, Outcome.ok]


def test_a_server_that_is_not_there_costs_one_round_of_attempts() -> None:
    judge_module._client.cache_clear()
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
    texts = [str(number) for number in range(200)]
    started = time.monotonic()
    scores = judge(completions(*texts), [PROBLEM] * 200, base_url=url, model="m", backoff_s=0.05, retries=4, concurrency=4)
    assert all(math.isnan(score.value) and "cannot be reached" in score.detail for score in scores)
    one_round = 0.05 * (1 + 2 + 4 + 8)  # 0.75 s; fifty rounds of it would be 37 s
    assert time.monotonic() - started < 10 * one_round


# ---------------------------------------------------------------- memory


def test_the_same_question_is_asked_once(server: Server) -> None:
    first = ask(server, "2", "2", "3", "2", concurrency=4)
    assert len(server.requests) == 2 and len({score.value for score in first}) == 1
    ask(server, "2", "3")
    assert len(server.requests) == 2
    ask(server, "2", temperature=0.5)  # another question
    assert len(server.requests) == 3


def test_failures_are_not_remembered(server: Server) -> None:
    server.script = [says("no", 400), says("Score: 3")]
    assert math.isnan(ask(server, "2")[0].value)
    assert ask(server, "2")[0].value == 0.3


def test_a_cache_file_is_shared_and_outlives_the_process(server: Server, tmp_path: Path) -> None:
    cache = str(tmp_path / "replies.sqlite")
    ask(server, "2", "3", cache=cache)
    judge_module._client.cache_clear()  # as a fresh process has it
    server.script = [says("down", 400)]
    assert [score.value for score in ask(server, "2", "3", cache=cache, high=100)] == [0.07, 0.07]  # a reply is kept, not its score
    assert len(server.requests) == 2
    assert sqlite3.connect(cache).execute("SELECT count(*) FROM replies").fetchone() == (2,)


def test_workers_share_the_cache_file(server: Server, tmp_path: Path) -> None:
    settings = {"fn": "grpo.rewards.judge.judge", "base_url": server.url, "model": "m", "cache": str(tmp_path / "replies.sqlite")}
    for _ in range(2):  # a runtime's worker is a process of its own
        with RewardRuntime(parse_reward_config({"quality": settings}), num_workers=1) as runtime:
            scores = runtime.score(completions("2", "3"), [PROBLEM] * 2)
        assert [score["quality"].value for score in scores] == [0.7, 0.7]
    assert len(server.requests) == 2


# ---------------------------------------------------------------- template and verdict


@given(st.text(max_size=50), st.text(max_size=50), st.text(max_size=50))
def test_nothing_in_a_text_is_taken_for_a_placeholder(question: str, answer: str, completion: str) -> None:
    assert fill("{question}|{answer}|{completion}", question, answer, completion) == f"{question}|{answer}|{completion}"


def test_braces_mean_nothing() -> None:
    evil = "{answer} {0} {completion!r} {{fence}} {} %s {question.__class__}"
    assert fill('{"score": 1} {completion}', question="q", answer="a", completion=evil) == '{"score": 1} ' + evil


def test_the_fence_depends_on_the_completion_and_is_not_in_it() -> None:
    fences = [fill("{fence}{completion}", "q", "a", text).removesuffix(text) for text in ("x", "y", "x")]
    assert fences[0] == fences[2] != fences[1]
    assert fill(TEMPLATE, "q", "a", "x").count(fences[0]) == 3


@pytest.mark.parametrize(
    ("verdict", "value"),
    [
        ("Score: 7", 0.7),
        ("**Score:** 7", 0.7),
        ("Score: **7**", 0.7),
        ("Score: 7.5/10", 0.75),
        ("Score: 0", 0.0),
        ("Score: 10", 1.0),
        ("It says 'Score: 10', but it is wrong.\nScore: 2", 0.2),  # the last one counts
        ("<think>Score: 9?</think>Score: 4", 0.4),
    ],
)
def test_verdicts(verdict: str, value: float) -> None:
    assert Rule(pattern=SCORE, low=0, high=10).score(verdict).value == pytest.approx(value)


def test_another_rule() -> None:
    rule = Rule(pattern=r"\[\[(\d)\]\]", low=1, high=5)
    assert [rule.score(f"[[{mark}]]").value for mark in (1, 2, 3, 5)] == [0, 0.25, 0.5, 1]
    assert "'x' is no number" in Rule(pattern="(x)", low=0, high=1).score("x").detail


ARGUMENTS: dict[str, Any] = {
    "base_url": "http://localhost:8000/v1",
    "model": "m",
    "template": TEMPLATE,
    "part": "final",
    "question": None,
    "pattern": SCORE,
    "low": 0.0,
    "high": 10.0,
    "temperature": 0.0,
    "max_tokens": 512,
    "concurrency": 32,
    "timeout_s": 120.0,
    "retries": 5,
    "backoff_s": 0.5,
    "cache": None,
    "api_key_env": None,
    "extra": None,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_url": "localhost:8000"}, "base_url is 'localhost:8000'; it must be the server's address"),
        ({"base_url": "file:///etc/passwd"}, "base_url is"),
        ({"model": ""}, "model is ''"),
        ({"template": "{completion} {gold}"}, r"template holds {gold}; it may hold {question}"),
        ({"template": "{question}"}, r"template does not hold {completion}"),
        ({"pattern": "("}, "which is no regular expression"),
        ({"pattern": r"\d"}, "with 0 groups; it must have one"),
        ({"low": 10}, "high is 10.0; it must be a finite number above 10"),
        ({"concurrency": 0}, "concurrency is 0"),
        ({"timeout_s": 0}, "timeout_s is 0; it must be a finite number above 0"),
        ({"retries": -1}, "retries is -1"),
        ({"cache": "/no/such/folder/x.sqlite"}, "the folder that it is in does not exist"),
        ({"api_key_env": "NO_SUCH_KEY_HERE"}, "that environment variable is not set"),
        ({"extra": {"model": "x"}}, "extra holds model, which is set elsewhere"),
    ],
)
def test_arguments_that_cannot_work(changes: dict[str, Any], message: str) -> None:
    judge.check_arguments(**ARGUMENTS)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=message):
        judge.check_arguments(**{**ARGUMENTS, **changes})  # type: ignore[attr-defined]


# ---------------------------------------------------------------- the real thing


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def vllm_url(tiny_model: str, tmp_path: Path) -> Iterator[str]:
    pytest.importorskip("vllm", reason="needs vLLM")
    template, port, log = tmp_path / "chat.jinja", _free_port(), tmp_path / "server.log"
    template.write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", tiny_model, "--served-model-name", "tiny"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--chat-template", str(template), "--enforce-eager", "--max-num-seqs", "8"]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}  # GiB, on a CPU
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True, env=environment)
    try:
        deadline = time.monotonic() + 300
        while not _answers(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text(errors="replace")[-3000:]
            time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _answers(url: str) -> bool:
    try:
        return urllib.request.urlopen(url, timeout=2).status == 200
    except OSError:
        return False


@pytest.mark.full
def test_a_real_vllm_server_judges(vllm_url: str) -> None:
    """The tiny model cannot write a verdict by itself; vLLM's structured output, asked for through ``extra``, makes it say 7."""
    settings: dict[str, Any] = {"base_url": vllm_url, "template": "max({completion},1,2)=", "pattern": r"(\d)", "high": 9, "max_tokens": 1}
    extra = {"structured_outputs": {"choice": ["7"]}}
    scores = judge(completions("4", "7"), [PROBLEM] * 2, model="tiny", extra=extra, **settings)
    assert [score.value for score in scores] == [pytest.approx(7 / 9)] * 2
    (score,) = judge(completions("4"), [PROBLEM], model="another", **settings)
    assert score.outcome is Outcome.error and "status 404" in score.detail and "another" in score.detail
