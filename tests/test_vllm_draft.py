"""What vLLM has made of a completion before a pause: its text is read on as if there had been none."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from grpo.rollouts.base import Begun, Job
from grpo.types import Request

pytestmark = pytest.mark.usefixtures("one_thread")

BYTES = sorted(ByteLevel.alphabet())  # a token for every byte


@pytest.fixture(scope="module")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(BPE({character: token for token, character in enumerate(BYTES)}, []))
    backend.pre_tokenizer, backend.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)


@pytest.mark.slow
@given(
    prompt=st.text(min_size=1, max_size=4),
    text=st.text(st.sampled_from("aé€😀"), min_size=1, max_size=8),
    noise=st.binary(max_size=3),
    stop=st.text(st.sampled_from("aé€😀"), min_size=1, max_size=3),
    data=st.data(),
)
def test_vllm_reads_on_across_a_pause(
    byte_tokenizer: PreTrainedTokenizerFast, prompt: str, text: str, noise: bytes, stop: str, data: st.DataObject
) -> None:
    """A character or stop string of several tokens, cut anywhere, or bytes that are no text: as without the pause."""
    from vllm import SamplingParams
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.output_processor import OutputProcessor

    from grpo.rollouts.vllm import _Draft

    cut_at = data.draw(st.integers(0, len(text)))
    prompt_ids = byte_tokenizer.encode(prompt)
    token_ids = byte_tokenizer.encode(text[:cut_at]) + [BYTES.index(encoded(byte)) for byte in noise] + byte_tokenizer.encode(text[cut_at:])
    params = SamplingParams(stop=[stop], include_stop_str_in_output=True)

    def detokenizer(begun: list[int]) -> Any:
        request = EngineCoreRequest("0", prompt_ids + begun, None, params, None, 0.0, None, None, None, external_req_id="0")
        processor = OutputProcessor(byte_tokenizer, log_stats=False)
        processor.add_request(request, None)
        job = Job(
            number=0,
            request=Request(problem_id="p", prompt_ids=tuple(prompt_ids), num_completions=1, seed=0),
            index=0,
            begun=Begun().extended(begun, [0.0] * len(begun), 0),
        )
        draft = _Draft(job, processor.request_states["0"], [])
        if begun:
            draft.go_on(byte_tokenizer, params)
        return draft.state.detokenizer

    def read(detokenizer: Any, tokens: list[int]) -> tuple[int, str | None]:
        for place, token in enumerate(tokens):
            if (found := detokenizer.update([token], stop_terminated=False)) is not None:
                return place, found
        return len(tokens), None

    whole = detokenizer([])
    ended, found = read(whole, token_ids)
    if ended:
        cut = data.draw(st.integers(1, ended))
        gone_on = detokenizer(token_ids[:cut])
        assert read(gone_on, token_ids[cut:]) == (ended - cut, found)
        assert (gone_on.output_text, gone_on.output_token_ids) == (whole.output_text, whole.output_token_ids)


def encoded(byte: int) -> str:
    """The character that stands for a byte in a byte-level vocabulary: itself if it is printable, else the next one after 255."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return chr(byte) if byte in printable else chr(256 + sum(other not in printable for other in range(byte)))
