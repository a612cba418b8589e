"""The conversation of verifiers' null harness without its program, which is started with uv for every rollout and takes seconds.

Imported by verifiers, as a plugin: it needs the package.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import Any

import httpx
from verifiers.v1 import Harness, HarnessConfig
from verifiers.v1.dialects.chat import message_to_wire
from verifiers.v1.harnesses.utils.compaction import bound_tool_message
from verifiers.v1.harnesses.utils.mcp import call_mcp, connect_mcp
from verifiers.v1.runtimes import ProgramResult

__all__ = ["InProcess"]


class InProcess(Harness[HarnessConfig]):
    """Turns and tool calls, until a turn without one. The tools are the task's MCP servers."""

    APPENDS_SYSTEM_PROMPT = True
    SUPPORTS_MCP = True
    SUPPORTS_RESUME = True
    SUPPORTS_TOOL_INTERCEPTION = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(
        self,
        ctx: Any,
        trace: Any,
        runtime: Any,
        endpoint: str,
        secret: str,
        mcp_urls: Mapping[str, str],
        data: Any,
        tool_interception_url: str | None = None,
    ) -> Any:
        if runtime.type != "subprocess":
            what = f"the harness {self.config.id} runs on this machine, and reaches nothing from a runtime of type {runtime.type}"
            raise ValueError(f"{what}\n  → choose another one: environment.agent.harness.id=bash")
        system, prompt = self.resolve_prompt(data)
        messages = [{"role": "system", "content": system}] if system else []
        messages += [{"role": "user", "content": prompt}] if isinstance(prompt, str) else map(message_to_wire, prompt or ())
        servers = {name: {"url": url, "timeout": self.config.tool_timeout} for name, url in mcp_urls.items()}
        async with AsyncExitStack() as stack:
            headers = {"Authorization": f"Bearer {secret}"}
            http = await stack.enter_async_context(httpx.AsyncClient(timeout=None, trust_env=False, headers=headers))
            schemas, dispatch, connections = await connect_mcp({"mcpServers": servers}, stack)
            tools = _Tools(dispatch, connections, http, tool_interception_url)
            offered = {"tools": schemas} if schemas else {}
            while True:
                answer = await http.post(f"{endpoint}/chat/completions", json={"model": ctx.model, "messages": messages, **offered})
                message = answer.raise_for_status().json()["choices"][0]["message"]
                messages.append(message)
                if not message.get("tool_calls"):
                    return ProgramResult(exit_code=0, stdout="", stderr="")
                messages += [await tools.result(call) for call in message["tool_calls"]]


class _Tools:
    """
    Args:
        gate: where verifiers is asked before each call, if the task has hooks that may forbid it.
    """

    def __init__(self, dispatch: Mapping[str, Any], connections: Any, http: httpx.AsyncClient, gate: str | None) -> None:
        self._dispatch, self._connections, self._http, self._gate = dispatch, connections, http, gate

    async def result(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """The message that answers a tool call."""
        name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
        if self._gate is not None:
            asked = await self._http.post(self._gate, json={"tool_call_id": call["id"], "name": name, "arguments": arguments})
            decision = asked.raise_for_status().json()
            if decision["action"] == "stop":
                raise RuntimeError(decision["reason"])  # verifiers knows, and ends the rollout
            if decision["action"] == "deny":
                return dict(bound_tool_message(decision["message"]))
        if name not in self._dispatch:
            said: Any = f"error: unknown tool {name!r}"
        elif not isinstance(arguments, dict):
            said = f"error: tool arguments must be a JSON object, got {type(arguments).__name__}; resend as an object"
        else:
            said = await call_mcp(self._connections, self._dispatch, name, arguments)
        return dict(bound_tool_message({"role": "tool", "tool_call_id": call["id"], "name": name, "content": said}))
