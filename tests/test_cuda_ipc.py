"""Weights read from the trainer's GPU: all of it with a GPU, and without one what does not need it."""

from __future__ import annotations

import inspect
import json
import pickle
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.multiprocessing.reductions import rebuild_cuda_tensor

from grpo.rollouts import flat
from grpo.rollouts.cuda_ipc import _COUNTER, _COUNTER_PLACE, _DEVICE, _EVENT_NEEDED, CudaIPC, PhysicalGPU, check_reachable, for_reader
from grpo.rollouts.proof import digest
from grpo.rollouts.weights import Spec

OWN = PhysicalGPU("boot-1", "node1", "GPU-a", "NVIDIA H200")
OTHER = replace(OWN, uuid="GPU-b")
DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.uint8]


def specs_of(tensors: dict[str, torch.Tensor]) -> dict[str, Spec]:
    return {name: Spec.of(tensor) for name, tensor in tensors.items()}


# --- one buffer for several tensors ---


def test_a_buffer_begins_every_tensor_at_a_multiple_of_16_bytes() -> None:
    specs = {"a": Spec((3,), "bfloat16"), "b": Spec((), "float32"), "none": Spec((0, 4), "float32"), "c": Spec((2, 5), "uint8")}
    # 3 × 2 bytes end at 6, so the next begins at 16; 4 more end at 20, the next at 32, empty; 10 bytes from there end at 42.
    assert flat.places(specs) == {"a": (0, 6), "b": (16, 20), "none": (32, 32), "c": (32, 42)}
    assert flat.size(specs) == 42 and flat.size({}) == 0


@given(shapes=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 5), st.sampled_from(DTYPES)), min_size=1, max_size=6))
def test_what_is_joined_is_parted_to_the_bit(shapes: list[tuple[int, int, torch.dtype]]) -> None:
    tensors = {str(i): torch.randn(rows, columns).to(dtype).T for i, (rows, columns, dtype) in enumerate(shapes)}
    parted = flat.parted(flat.joined(tensors, specs_of(tensors)), specs_of(tensors))
    assert list(parted) == list(tensors)
    assert all(digest(parted[name]) == digest(tensor) for name, tensor in tensors.items())


# --- who can read ---


def test_gpus_are_told_by_their_uuid_whatever_number_they_have() -> None:
    asked: list[int] = []

    def can_access(index: int) -> bool:
        asked.append(index)
        return index == 1

    check_reachable(OWN, OWN, {"GPU-b": 0, "GPU-a": 1}, can_access)
    assert asked == [], "its own memory"
    check_reachable(OTHER, OWN, {"GPU-a": 0, "GPU-b": 1}, can_access)
    assert asked == [1]
    check_reachable(OTHER, OWN, {"GPU-a": 0}, can_access)
    assert asked == [1], "hidden from this process: CUDA cannot be asked, and may still map it"


def test_a_gpu_out_of_reach_is_named_with_the_remedy() -> None:
    with pytest.raises(RuntimeError, match=r"on node1 .*GPU-a.* trainer's weights on node1 .*GPU-b.*: there is no peer access") as caught:
        check_reachable(OTHER, OWN, {"GPU-a": 0, "GPU-b": 1}, lambda index: False)
    assert "rollout.transfer=nccl" in str(caught.value)
    with pytest.raises(RuntimeError, match=r"trainer's weights on node2 .*: CUDA IPC stays within one machine"):
        check_reachable(replace(OWN, boot="boot-2", host="node2"), OWN, {"GPU-a": 0}, lambda index: True)


def test_a_reader_maps_the_buffer_on_its_own_gpu_takes_no_part_in_the_count_and_opens_no_event_of_another_gpu() -> None:
    names = list(inspect.signature(rebuild_cuda_tensor).parameters)
    assert [names[i] for i in (_DEVICE, _COUNTER, _COUNTER_PLACE)] == ["storage_device", "ref_counter_handle", "ref_counter_offset"]
    assert names[_EVENT_NEEDED] == "event_sync_required"
    handle = tuple(names)
    arguments = for_reader(handle, 3)
    changed = {i for i, (old, new) in enumerate(zip(handle, arguments, strict=True)) if old != new}
    assert changed == {_DEVICE, _COUNTER, _EVENT_NEEDED} and arguments[_DEVICE] == 3 and arguments[_EVENT_NEEDED] is False


# --- with a GPU ---

READER = """
import json, pickle, sys
from grpo.rollouts.proof import digest
parcels = pickle.load(sys.stdin.buffer)
for _ in range(2):  # as an engine does that is given the last weights again
    digests = {name: digest(tensor) for parcel in parcels for name, tensor in parcel.open().items()}
print(json.dumps(digests))
"""


def read_elsewhere(parcels: list[object]) -> dict[str, str]:
    done = subprocess.run([sys.executable, "-c", READER], input=pickle.dumps(parcels), capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    digests: dict[str, str] = json.loads(done.stdout)
    return digests


@pytest.mark.gpu
@pytest.mark.slow
def test_other_processes_read_the_weights_and_the_memory_comes_back() -> None:
    transfer = CudaIPC()
    before = torch.cuda.memory_allocated()
    tensors = {str(i): torch.randn(1000, 999, device="cuda").to(dtype) for i, dtype in enumerate([torch.float32, torch.bfloat16])}
    tensors["on the host"] = torch.arange(7)
    sent = {name: digest(tensor) for name, tensor in tensors.items()}
    parcels = [transfer.send({name: tensor}) for name, tensor in tensors.items()]
    for tensor in tensors.values():
        tensor.zero_()  # the optimiser goes on
    assert read_elsewhere(list(parcels)) == sent
    assert read_elsewhere(list(parcels)) == sent, "an engine that replaces another"
    del tensors, tensor
    transfer.discard(parcels[:2])
    transfer.discard(parcels[:2])
    assert torch.cuda.memory_allocated() < before + 1_000_000, "read more than once"
    transfer.send({"never read": torch.ones(1 << 20, device="cuda")})
    transfer.close()
    assert torch.cuda.memory_allocated() == before
