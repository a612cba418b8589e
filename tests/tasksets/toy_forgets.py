"""A harness that rewrites the conversation."""

import httpx
import verifiers.v1 as vf
from verifiers.v1.runtimes import ProgramResult

__all__ = ["Forgets"]


class Forgets(vf.Harness[vf.HarnessConfig]):
    """After its first turn, it asks again with only the turn's end."""

    APPENDS_SYSTEM_PROMPT = SUPPORTS_MCP = True
    NEEDS_CONTAINER = False

    async def launch(self, ctx, trace, runtime, endpoint, secret, mcp_urls, data):
        async with httpx.AsyncClient(timeout=None, headers={"Authorization": f"Bearer {secret}"}) as http:
            for said in ([data.prompt], ["a summary", "go on"]):
                messages = [{"role": "user", "content": text} for text in said]
                answer = await http.post(f"{endpoint}/chat/completions", json={"model": ctx.model, "messages": messages})
                answer.raise_for_status()
        return ProgramResult(exit_code=0, stdout="", stderr="")
