"""How rollouts are laid out for the model, and where each trained token's prediction stands. Nothing else knows of padding.

``padded``         one rollout a row, right-padded: any causal model; the oracle of the tests.
``packed``         all rollouts one behind the other in one line, none seeing another: no padding.
``shared_prompt``  one line that is a tree: what all prompts begin with, once; then, a group at a time, the rest of its prompt, once, and
                   every completion, each seeing the prompt and itself.

Which of them a model allows is said by ``grpo.model_support``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, compress
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from grpo.batch import Batch, on_device
from grpo.tree_attention import Tree, build_tree
from grpo.types import Completion, Rollout

LayoutName = Literal["padded", "packed", "shared_prompt"]
Rows = Sequence[Sequence[Rollout]]  # the rollouts of a row have one prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInputs:
    """What the model is called with, and ``gather`` [tokens]: positions in the flattened [rows · length] that predict ``targets``."""

    input_ids: Int[Tensor, "rows length"]
    position_ids: Int[Tensor, "rows length"]
    gather: Int[Tensor, " tokens"]
    targets: Int[Tensor, " tokens"]
    attention_mask: Int[Tensor, "rows length"] | None = None  # padded: 1 where there is a token
    tree: Tree | None = None  # packed and shared_prompt: who sees whom in the line
    kept: tuple[bytes, ...] = ()  # the kept set of each target (``grpo.kept``), if sampling was truncated; they stay on the host

    @property
    def attention(self) -> dict[str, Any]:
        """The keyword argument that tells the model what each token may see."""
        return {"attention_mask": self.attention_mask} if self.tree is None else {"tree": self.tree}

    def to(self, device: torch.device) -> ModelInputs:
        tensors = {name: on_device(v, device) for name in self.__slots__ if isinstance(v := getattr(self, name), Tensor)}
        return replace(self, **tensors, tree=self.tree and self.tree.to(device))  # type: ignore[arg-type]


@dataclass(slots=True)
class _Line:
    """A line of tokens being written, and where in it the predictions of the completions' tokens stand."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    gather: list[int] = field(default_factory=list)

    def write(self, tokens: Sequence[int], position: int) -> None:
        self.ids += tokens
        self.positions += range(position, position + len(tokens))

    def complete(self, completion: Completion, last_of_prompt: int) -> None:
        """The shift by one: a completion's first token is predicted by the prompt's last, every other by the one before it.

        So its last token predicts nothing: it is a target and never an input. Of an environment's tokens it is the other way round:
        they are inputs, and nobody's targets.
        """
        predictors = [last_of_prompt, *range(len(self.ids), len(self.ids) + num_inputs(completion))]
        self.write(completion.token_ids[: num_inputs(completion)], position=len(completion.prompt_ids))
        self.gather += compress(predictors, completion.sampled) if completion.sampled else predictors

    def inputs(self, rows: Rows, tree: Tree) -> ModelInputs:
        return ModelInputs(
            input_ids=torch.tensor([self.ids]),
            position_ids=torch.tensor([self.positions]),
            gather=torch.tensor(self.gather),
            targets=_targets(rows),
            tree=tree,
            kept=_kept(rows),
        )


def padded(rows: Rows) -> ModelInputs:
    lines = []
    for rollout in _flat(rows):
        lines.append(line := _Line())
        line.write(rollout.completion.prompt_ids, position=0)
        line.complete(rollout.completion, last_of_prompt=len(line.ids) - 1)
    length = max(len(line.ids) for line in lines)
    return ModelInputs(
        input_ids=torch.tensor([line.ids + [0] * (length - len(line.ids)) for line in lines]),
        position_ids=torch.arange(length).expand(len(lines), -1),
        gather=torch.tensor([y * length + x for y, line in enumerate(lines) for x in line.gather]),
        targets=_targets(rows),
        attention_mask=torch.tensor([[1] * len(line.ids) + [0] * (length - len(line.ids)) for line in lines]),
        kept=_kept(rows),
    )


def packed(rows: Rows) -> ModelInputs:
    line, lengths = _Line(), []
    for rollout in _flat(rows):
        start = len(line.ids)
        line.write(rollout.completion.prompt_ids, position=0)
        line.complete(rollout.completion, last_of_prompt=len(line.ids) - 1)
        lengths.append(len(line.ids) - start)
    return line.inputs(rows, build_tree(0, lengths, [()] * len(lengths)))


def shared_prompt(rows: Rows) -> ModelInputs:
    prompts = [row[0].completion.prompt_ids for row in rows]
    prefix = common_prefix(prompts)
    line = _Line()
    line.write(prompts[0][:prefix], position=0)
    for prompt, row in zip(prompts, rows, strict=True):
        line.write(prompt[prefix:], position=prefix)
        last_of_prompt = len(line.ids) - 1
        for rollout in row:
            line.complete(rollout.completion, last_of_prompt)
    completions = [[num_inputs(r.completion) for r in row] for row in rows]
    return line.inputs(rows, build_tree(prefix, [len(prompt) - prefix for prompt in prompts], completions))


LAYOUTS: Mapping[LayoutName, Callable[[Rows], ModelInputs]] = {"padded": padded, "packed": packed, "shared_prompt": shared_prompt}


def lay_out(rows: Rows, layout: LayoutName | bool) -> ModelInputs:
    """Rows of rollouts → tensors; the order of ``gather`` and ``targets`` is that of the rows."""
    return LAYOUTS[_name(layout)](rows)


def microbatches(batch: Batch, layout: LayoutName | bool, budget: int) -> Iterator[list[list[int]]]:
    """Rows of rollouts (positions in the batch), filled up to ``budget`` input tokens, padding included.

    The longest row comes first, so that memory fails at once if at all. A row that is longer than the budget is alone.
    """
    layout = _name(layout)
    prefix = common_prefix([r.completion.prompt_ids for r in batch.rollouts]) if layout == "shared_prompt" and batch.rollouts else 0
    filled: list[list[int]] = []
    used = widest = 0
    for row in rows(batch, layout, budget):
        length = row_length(batch, row) - prefix
        counted = widest if layout == "padded" and filled else length  # rows are padded to the first
        if filled and used + counted > budget:
            yield filled
            filled = []
        if not filled:
            used, widest = prefix, length
            counted = length
        filled.append(row)
        used += counted
    if filled:
        yield filled


def rows(batch: Batch, layout: LayoutName | bool, budget: int) -> list[list[int]]:
    """Which rollouts stand in which row, longest row first. A row is one rollout or, in ``shared_prompt``, a group.

    A group longer than ``budget`` tokens is cut into several rows, each with the prompt.
    """
    if _name(layout) != "shared_prompt":
        alone = [[i] for i in range(len(batch.rollouts))]
        return sorted(alone, key=lambda row: -row_length(batch, row))
    groups: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for i, rollout in enumerate(batch.rollouts):
        groups.setdefault((int(batch.group_index[i]), rollout.completion.prompt_ids), []).append(i)
    out: list[list[int]] = []
    for (_, prompt), members in groups.items():
        out.append([])
        used = len(prompt)
        for i in members:
            length = num_inputs(batch.rollouts[i].completion)
            if out[-1] and used + length > budget:
                out.append([])
                used = len(prompt)
            out[-1].append(i)
            used += length
    return sorted(out, key=lambda row: -row_length(batch, row))


def row_length(batch: Batch, row: Sequence[int]) -> int:
    """Input tokens of a row, its whole prompt included."""
    completions = [batch.rollouts[i].completion for i in row]
    return len(completions[0].prompt_ids) + sum(map(num_inputs, completions))


def num_inputs(completion: Completion) -> int:
    """Tokens of a completion that its trained tokens are predicted from: all before the last one that the policy sampled."""
    behind = next((i for i, own in enumerate(reversed(completion.sampled)) if own), 0)
    return len(completion.token_ids) - 1 - behind


def common_prefix(prompts: Sequence[tuple[int, ...]]) -> int:
    """Tokens that all prompts begin with, one less than the shortest at most: each keeps the token that predicts its first."""
    first, last = min(prompts), max(prompts)  # in dictionary order, no other two differ sooner
    limit = min(map(len, prompts)) - 1
    return next((i for i in range(limit) if first[i] != last[i]), limit)


def unsupported(config: Any) -> str | None:
    """Why this model (its transformers config) cannot share a prompt between completions; None if it can.

    Sliding windows and linear attention would compute something else without a word (measured), so they are named here.
    """
    config = config.get_text_config() if hasattr(config, "get_text_config") else config  # of a multimodal model: its language model
    layer_types = set(getattr(config, "layer_types", None) or ())
    if other := layer_types - {"full_attention"}:
        return f"it has {', '.join(sorted(other))} layers"
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return "it has sliding-window attention"
    if getattr(config, "attention_dropout", 0):
        return "it has attention dropout"
    return None


def _flat(rows: Rows) -> list[Rollout]:
    return [rollout for row in rows for rollout in row]


def _targets(rows: Rows) -> Tensor:
    return torch.tensor([token for rollout in _flat(rows) for token in rollout.completion.sampled_ids])


def _kept(rows: Rows) -> tuple[bytes, ...]:
    completions = [rollout.completion for rollout in _flat(rows)]
    if not any(completion.kept for completion in completions):
        return ()
    return tuple(chain.from_iterable(completion.kept or (b"",) * completion.num_sampled for completion in completions))


def _name(layout: LayoutName | bool) -> LayoutName:
    if isinstance(layout, bool):
        return "shared_prompt" if layout else "padded"
    return layout
