"""The shared-prompt attention by parts against SDPA with a dense mask: same numbers, seconds of forward and backward.

    python benchmarks/attention.py [--groups 4 --samples 8 --prefix 180 --prompt 12 --completion 36]

Shapes are one layer of SmolLM2-135M in bf16. Read the ratio, not the seconds: machines differ.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo.tree_attention import build_tree, dense_mask, tree_attention

HEADS, KV_HEADS, WIDTH = 9, 3, 64


def seconds(f: Callable[[], Tensor], repeats: int = 10) -> float:
    f().sum().backward()
    start = time.perf_counter()
    for _ in range(repeats):
        f().sum().backward()
    return (time.perf_counter() - start) / repeats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("groups", 4), ("samples", 8), ("prefix", 180), ("prompt", 12), ("completion", 36)):
        parser.add_argument(f"--{name}", type=int, default=default)
    a = parser.parse_args()
    completions = [[a.completion] * a.samples for _ in range(a.groups)]
    tree = build_tree(a.prefix, [a.prompt] * a.groups, completions)
    length = a.prefix + a.groups * (a.prompt + a.samples * a.completion)
    q, k, v = (torch.randn(1, h, length, WIDTH, dtype=torch.bfloat16, requires_grad=True) for h in (HEADS, KV_HEADS, KV_HEADS))
    mask, shared = dense_mask(tree.seen_until), HEADS // KV_HEADS

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(q, k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1), attn_mask=mask)

    def by_parts() -> Tensor:
        return tree_attention(q, k, v, tree, WIDTH**-0.5)

    print(f"{length} tokens in one line; largest difference {(dense() - by_parts()).abs().max():.3f} (bf16)")
    slow, fast = seconds(dense), seconds(by_parts)
    print(f"SDPA with a dense mask {slow * 1e3:.1f} ms, by parts {fast * 1e3:.1f} ms: {slow / fast:.1f} times as fast")


if __name__ == "__main__":
    main()
