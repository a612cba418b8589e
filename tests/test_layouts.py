"""Layouts without a model: where each token stands, how micro-batches are filled, and who sees whom in a line."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grpo import layouts, tree_attention
from grpo.batch import Batch, collate
from grpo.layouts import LayoutName, ModelInputs
from grpo.toy import toy_rollout
from grpo.types import Completion, Group, Problem, Rollout

VOCAB = 50
LAYOUTS: tuple[LayoutName, ...] = ("padded", "packed", "shared_prompt")
PROMPTS = {  # what comes before the prompts
    "strangers": lambda g: (),
    "worked examples": lambda g: (7, 8, 9, 7, 8, 9),
    "nested": lambda g: (7,) * (30 - 3 * g),  # each the beginning of those before it, up to its own tokens
}
some_shapes = st.lists(st.tuples(st.integers(1, 12), st.lists(st.integers(1, 8), min_size=1, max_size=5)), min_size=1, max_size=5)


def make_batch(shapes: Sequence[tuple[int, Sequence[int]]], seed: int = 0, prompts: str = "strangers", turns: bool = False) -> Batch:
    """``shapes``: of each group, the tokens of its prompt and of each completion. ``turns``: some of those are an environment's."""
    rng = random.Random(seed)
    groups = []
    for g, (prompt_length, lengths) in enumerate(shapes):
        problem = Problem(id=f"p{g}", prompt="?", answer="1")
        prompt = (*PROMPTS[prompts](g), *rng.choices(range(VOCAB), k=prompt_length))
        rollouts = []
        for i, length in enumerate(lengths):
            tokens = rng.choices(range(VOCAB), k=length)
            rollouts.append(toy_rollout(problem, i, prompt, tokens, sampled=rng.choice([(), some_sampled(rng, length)]) if turns else ()))
        groups.append(Group(problem=problem, rollouts=tuple(rollouts)))
    return collate(groups)


def some_sampled(rng: random.Random, length: int) -> tuple[bool, ...]:
    """One token of the policy's at least; the others anyone's, those at either end as well."""
    certain = rng.randrange(length)
    return tuple(i == certain or rng.random() < 0.5 for i in range(length))


def laid_out(batch: Batch, layout: LayoutName, budget: int) -> list[tuple[list[list[int]], ModelInputs]]:
    parts = layouts.microbatches(batch, layout, budget)
    return [(part, layouts.lay_out([[batch.rollouts[i] for i in row] for row in part], layout)) for part in parts]


# ---------------------------------------------------------------- where each token stands


def test_padded_golden() -> None:
    """Prompt (p₀ p₁), completions (a b c) and (d): rows p₀ p₁ a b and p₀ p₁ · ·; c and d predict nothing, so they are no inputs."""
    batch = make_batch([(2, (3, 1))])
    first, second = (r.completion for r in batch.rollouts)
    inputs = layouts.padded([[r] for r in batch.rollouts])
    assert inputs.input_ids.tolist() == [[*first.prompt_ids, *first.token_ids[:2]], [*first.prompt_ids, 0, 0]]
    assert inputs.position_ids.tolist() == [[0, 1, 2, 3]] * 2
    assert inputs.attention.keys() == {"attention_mask"}
    assert inputs.attention["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert inputs.gather.tolist() == [1, 2, 3, 4 + 1]
    assert inputs.targets.tolist() == [*first.token_ids, *second.token_ids]


def test_packed_golden() -> None:
    """One line p₀ p₁ a b | p₀ p₁, positions from 0 again; nobody sees over the bar."""
    batch = make_batch([(2, (3, 1))])
    first, second = (r.completion for r in batch.rollouts)
    inputs = layouts.packed([[r] for r in batch.rollouts])
    assert inputs.input_ids.tolist() == [[*first.prompt_ids, *first.token_ids[:2], *second.prompt_ids]]
    assert inputs.position_ids.tolist() == [[0, 1, 2, 3, 0, 1]]
    assert inputs.attention.keys() == {"tree"}
    assert inputs.tree is not None and inputs.tree.seen_until.tolist() == [4, 4, 4, 4, 6, 6]
    assert inputs.tree.longest == 4
    assert inputs.gather.tolist() == [1, 2, 3, 5]
    assert inputs.targets.tolist() == [*first.token_ids, *second.token_ids]


def test_shared_prompt_golden() -> None:
    """Prompts (p q r), (p q s t) with completions (a b c), (d) and (e f): one line p q | r | a b | s t | e.

    p q are seen by all 8 inputs; r until its group ends, after b (5); a b by themselves; s t until the end; e by itself.
    """
    batch = make_batch([(1, (3, 1)), (2, (2,))])
    completions = [r.completion for r in batch.rollouts]
    prompts = [(1, 2, 3), (1, 2, 3), (1, 2, 4, 5)]
    rollouts = [
        Rollout(problem=r.problem, completion=_with_prompt(c, p), scores={}, reward=0.0)
        for r, c, p in zip(batch.rollouts, completions, prompts, strict=True)
    ]
    (a, b, _), (e, _) = completions[0].token_ids, completions[2].token_ids
    inputs = layouts.shared_prompt([rollouts[:2], rollouts[2:]])
    assert inputs.input_ids.tolist() == [[1, 2, 3, a, b, 4, 5, e]]
    assert inputs.position_ids.tolist() == [[0, 1, 2, 3, 4, 2, 3, 4]]
    assert inputs.tree is not None and inputs.tree.seen_until.tolist() == [8, 8, 5, 5, 5, 8, 8, 8]
    assert inputs.tree.longest == 5
    # a is predicted by r (2), b by a (3), c by b (4); d by r; e by t (6), f by e (7)
    assert inputs.gather.tolist() == [2, 3, 4, 2, 6, 7]
    assert inputs.targets.tolist() == [token for c in completions for token in c.token_ids]


def test_what_an_environment_said_is_an_input_and_no_target() -> None:
    """Prompt (p q), completion a b | x y | c | z with x y z an environment's: z comes after all that is trained, and c predicts nothing.

    a is predicted by q (1), b by a (2), c by y (5); the second completion, (d), by q. Columns: p q a b x y.
    """
    batch = make_batch([(2, (6, 1))])
    first = replace(batch.rollouts[0].completion, token_ids=(11, 12, 13, 14, 15, 16), sampled=(True, True, False, False, True, False))
    rows = [replace(batch.rollouts[0], completion=first), batch.rollouts[1]]
    (p, q), (d,) = first.prompt_ids, rows[1].completion.token_ids
    inputs = layouts.shared_prompt([rows])
    assert inputs.input_ids.tolist() == [[p, q, 11, 12, 13, 14]]
    assert inputs.position_ids.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert (inputs.gather.tolist(), inputs.targets.tolist()) == ([1, 2, 5, 1], [11, 12, 15, d])
    assert layouts.packed([[r] for r in rows]).gather.tolist() == [1, 2, 5, 7]
    assert layouts.padded([[r] for r in rows]).gather.tolist() == [1, 2, 5, 7]


def _with_prompt(completion: Completion, prompt: tuple[int, ...]) -> Completion:
    fields = {name: getattr(completion, name) for name in completion.__slots__}
    return Completion(**fields | {"prompt_ids": prompt})


@given(some_shapes, st.sampled_from(sorted(PROMPTS)), st.sampled_from(LAYOUTS), st.integers(1, 150), st.integers(0, 10**6), st.booleans())
def test_what_a_predictor_sees_is_exactly_what_stood_before_its_target(
    shapes: list[tuple[int, list[int]]], prompts: str, layout: LayoutName, budget: int, seed: int, turns: bool
) -> None:
    batch = make_batch(shapes, seed, prompts, turns)
    for part, inputs in laid_out(batch, layout, budget):
        if inputs.tree is None:
            assert inputs.attention_mask is not None
            ends = inputs.attention_mask.sum(1, keepdim=True)
            sees = torch.stack([tree_attention.dense_mask(end.expand(inputs.input_ids.shape[1])) for end in ends])
        else:
            sees = tree_attention.dense_mask(inputs.tree.seen_until)[None]
        told = iter(zip(inputs.gather.tolist(), inputs.targets.tolist(), strict=True))
        for completion in (batch.rollouts[i].completion for row in part for i in row):
            whole = completion.prompt_ids + completion.token_ids
            trained = completion.sampled or (True,) * len(completion.token_ids)
            for at in (at for at, own in enumerate(trained, start=len(completion.prompt_ids)) if own):
                predictor, target = next(told)
                row, column = divmod(predictor, inputs.input_ids.shape[1])
                seen = sees[row, column]
                assert target == whole[at]
                assert inputs.input_ids[row, seen].tolist() == list(whole[:at])
                assert inputs.position_ids[row, seen].tolist() == list(range(at))
        assert next(told, None) is None


# ---------------------------------------------------------------- micro-batches


def test_a_prompt_is_computed_once_a_group_and_a_common_beginning_once() -> None:
    def computed(batch: Batch, layout: LayoutName, budget: int) -> list[int]:
        return [inputs.input_ids.numel() for _, inputs in laid_out(batch, layout, budget)]

    shapes = [(30, (4, 4, 4, 2)), (30, (4, 4, 4, 2))]
    batch = make_batch(shapes)
    assert computed(batch, "padded", 10_000) == [8 * (30 + 3)]
    assert computed(batch, "packed", 10_000) == [6 * (30 + 3) + 2 * (30 + 1)]
    assert computed(batch, "shared_prompt", 10_000) == [2 * (30 + 3 * 3 + 1)]
    assert computed(batch, "shared_prompt", 36) == [30 + 2 * 3] * 2 + [30 + 3 + 1] * 2  # groups are cut to the budget
    assert computed(make_batch(shapes, prompts="worked examples"), "shared_prompt", 10_000) == [6 + 2 * (30 + 3 * 3 + 1)]


@given(some_shapes, st.sampled_from(sorted(PROMPTS)), st.sampled_from(LAYOUTS), st.integers(1, 150), st.booleans())
def test_microbatches_hold_every_rollout_once_within_the_budget_longest_first(
    shapes: list[tuple[int, list[int]]], prompts: str, layout: LayoutName, budget: int, turns: bool
) -> None:
    batch = make_batch(shapes, prompts=prompts, turns=turns)
    parts = laid_out(batch, layout, budget)
    rows = [row for part, _ in parts for row in part]
    assert sorted(i for row in rows for i in row) == list(range(len(batch.rollouts)))
    lengths = [layouts.row_length(batch, row) for row in rows]
    assert lengths == sorted(lengths, reverse=True)
    for row in rows:
        assert len({batch.rollouts[i].completion.prompt_ids for i in row}) == 1, "a row shares one prompt"
        assert layout == "shared_prompt" or len(row) == 1
    for part, inputs in parts:
        alone = [len(row) for row in part] == [1]  # a rollout longer than the budget has to go somewhere
        assert alone or inputs.input_ids.numel() <= budget


def test_a_group_whose_prompts_differ_is_not_laid_out_under_one_of_them() -> None:
    batch = make_batch([(3, (2, 2))])
    other = batch.rollouts[1]
    changed = Rollout(problem=other.problem, completion=_with_prompt(other.completion, (1, 1, 1, 1)), scores={}, reward=0.0)
    batch = Batch(**{name: getattr(batch, name) for name in batch.__slots__} | {"rollouts": (batch.rollouts[0], changed)})
    assert sorted(layouts.rows(batch, "shared_prompt", 1000)) == [[0], [1]]


def test_an_empty_batch_has_no_microbatches() -> None:
    empty = make_batch([(3, (2, 2))]).select([])
    for layout in LAYOUTS:
        assert list(layouts.microbatches(empty, layout, 100)) == []


# ---------------------------------------------------------------- attention over a line


some_trees = st.tuples(
    st.integers(0, 9),
    st.lists(st.tuples(st.integers(1, 12), st.lists(st.integers(0, 15), max_size=4)), min_size=1, max_size=4),
)
HEADS = [(4, 4, 8, 8), (6, 2, 8, 8), (4, 4, 12, 6), (2, 1, 4, 10)]  # heads, key heads, width, value width


def line(tree: tree_attention.Tree, heads: tuple[int, int, int, int], dtype: torch.dtype, scale: float = 1.0) -> list[Tensor]:
    num_heads, kv_heads, width, value_width = heads
    shapes = ((num_heads, width), (kv_heads, width), (kv_heads, value_width))
    made = [scale * torch.randn(1, len(tree.seen_until), h, w, dtype=dtype) for h, w in shapes]
    return [values.transpose(1, 2).detach().requires_grad_() for values in made]


def textbook(query: Tensor, key: Tensor, value: Tensor, tree: tree_attention.Tree, scaling: float) -> Tensor:
    shared = query.shape[1] // key.shape[1]
    scores = scaling * query @ key.repeat_interleave(shared, 1).mT
    return scores.masked_fill(~tree_attention.dense_mask(tree.seen_until), -torch.inf).softmax(-1) @ value.repeat_interleave(shared, 1)


def with_gradients(attention: Any, lines: list[Tensor], *rest: Any) -> list[Tensor]:
    out = attention(*lines, *rest)
    weights = torch.sin(torch.arange(out.numel(), dtype=out.dtype)).view(out.shape)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), lines)]


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut and chunk at sizes that toy lines reach."""
    monkeypatch.setattr(tree_attention, "PIECE", 4)
    monkeypatch.setattr(tree_attention, "SLACK", 8)
    monkeypatch.setattr(tree_attention, "CHUNK", 64)


def check_by_parts(shape: tuple[int, list[tuple[int, list[int]]]], heads: tuple[int, int, int, int], seed: int) -> None:
    torch.manual_seed(seed)
    prefix, groups = shape
    tree = tree_attention.build_tree(prefix, [p for p, _ in groups], [lengths for _, lengths in groups])
    lines = line(tree, heads, torch.float64, scale=3.0)
    mine, true = (with_gradients(f, lines, tree, 0.3) for f in (tree_attention.tree_attention, textbook))
    for a, b in zip(mine, true, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@settings(max_examples=60)
@given(some_trees, st.sampled_from(HEADS), st.integers(0, 10**6))
def test_attention_by_parts_is_softmax_over_what_is_seen(
    shape: tuple[int, list[tuple[int, list[int]]]], heads: tuple[int, int, int, int], seed: int
) -> None:
    check_by_parts(shape, heads, seed)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("heads", HEADS)
def test_cutting_long_segments_and_chunking_scores_change_nothing(heads: tuple[int, int, int, int]) -> None:
    for seed, shape in enumerate(((0, [(11, [13, 1, 0, 6])]), (9, [(1, [30]), (17, [2, 2, 2]), (4, [])]), (4, [(4, [4, 8])]))):
        check_by_parts(shape, heads, seed)


def test_large_scores_neither_overflow_nor_vanish() -> None:
    """Scores of hundreds, either sign: e^s alone would be inf or 0 in float32, whichever part of the line holds the largest."""
    torch.manual_seed(0)
    tree = tree_attention.build_tree(5, [3, 7], [[4, 2], [9]])
    query, key, value = line(tree, (2, 2, 4, 4), torch.float32, scale=20.0)
    for sign in (1.0, -1.0):
        lines = [query.detach().abs().requires_grad_(), (sign * key.detach().abs()).requires_grad_(), value]
        scores = 0.5 * lines[0] @ lines[1].mT
        assert float(scores.abs().median()) > 100
        mine = with_gradients(tree_attention.tree_attention, lines, tree, 0.5)
        true = with_gradients(textbook, [x.detach().double().requires_grad_() for x in lines], tree, 0.5)
        for a, b in zip(mine, true, strict=True):
            assert float((a - b).norm() / b.norm()) < 1e-3  # a float32 score of 10³ is good to 10⁻⁴, and so is e^s


def test_bf16_is_as_good_as_sdpa_to_a_factor_of_four() -> None:
    torch.manual_seed(0)
    tree = tree_attention.build_tree(40, [20, 90], [[40, 30, 7], [60, 50]])
    lines = [values.bfloat16() for values in line(tree, (6, 2, 64, 64), torch.float32)]
    true = with_gradients(textbook, [x.double().requires_grad_() for x in lines], tree, 0.125)

    def error(attention: Any, *rest: Any) -> list[float]:
        mine = with_gradients(attention, [x.detach().requires_grad_() for x in lines], *rest, 0.125)
        return [float((a - b).norm() / b.norm()) for a, b in zip(mine, true, strict=True)]

    for by_parts, dense in zip(
        error(tree_attention.tree_attention, tree), error(tree_attention.dense_tree_attention, tree.seen_until), strict=True
    ):
        assert by_parts < 4 * dense


@settings(max_examples=10)
@given(some_trees, st.integers(0, 10**6))
def test_flex_attention_means_the_same(shape: tuple[int, list[tuple[int, list[int]]]], seed: int) -> None:
    """Its mask function on every pair, and (uncompiled, as it runs without a GPU) its numbers."""
    torch.manual_seed(seed)
    prefix, groups = shape
    tree = tree_attention.build_tree(prefix, [p for p, _ in groups], [lengths for _, lengths in groups])
    block_mask = tree_attention.flex_mask(tree.seen_until)
    at, none = torch.arange(len(tree.seen_until)), torch.tensor(0)
    by_function = block_mask.mask_mod(none, none, at[:, None], at[None])
    assert torch.equal(by_function, tree_attention.dense_mask(tree.seen_until))
    for heads in ((4, 2, 16, 16), (6, 2, 16, 16)):
        lines = [x.detach() for x in line(tree, heads, torch.float32)]
        out = tree_attention.flex_tree_attention(*lines, block_mask, 0.3)
        torch.testing.assert_close(out, textbook(*lines, tree, 0.3), rtol=1e-4, atol=1e-5)


def test_the_block_mask_is_made_on_the_gpu_of_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on the process's current one, which may be another."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    made: list[torch.device] = []
    monkeypatch.setattr(tree_attention, "_make_block_mask", lambda kind: lambda *args, device: made.append(device))
    with FakeTensorMode():  # a GPU that need not be there
        tree_attention.flex_mask(torch.zeros(300, dtype=torch.long, device="cuda:1"))
    assert made == [torch.device("cuda:1")]


@pytest.mark.parametrize(("heads", "kv_heads"), [(12, 2), (4, 2), (4, 4)])
def test_flex_attention_is_given_each_key_once(monkeypatch: pytest.MonkeyPatch, heads: int, kv_heads: int) -> None:
    """Repeated for each query head, the keys and values of Qwen2.5-1.5B (12 heads on 2) would take six times the memory."""
    given: list[Any] = []
    monkeypatch.setattr(tree_attention, "_flex", lambda kind: lambda *lines, **options: given.append((lines, options["enable_gqa"])))
    lines = line(tree_attention.build_tree(3, [2], [[4]]), (heads, kv_heads, 16, 16), torch.float32)
    tree_attention.flex_tree_attention(*lines, None, 0.3)
    (((query, key, value), shared),) = given
    assert query is lines[0] and key is lines[1] and value is lines[2] and shared == (heads != kv_heads)


@pytest.mark.full
def test_the_compiled_block_mask_is_the_same_at_every_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is made on a GPU. Nothing of an earlier line may be compiled in, neither its length nor who sees whom."""
    plain, compiled = tree_attention._make_block_mask("cpu"), tree_attention._make_block_mask("cuda")
    for seed, lengths in enumerate([(300, 40), (500, 200), (60, 30), (500, 200), (90, 1)]):
        rng = random.Random(seed)
        tree = tree_attention.build_tree(lengths[0], [lengths[1]], [[rng.randint(1, 90) for _ in range(5)]])
        masks = []
        for make in (plain, compiled):
            monkeypatch.setattr(tree_attention, "_make_block_mask", lambda kind, make=make: make)
            masks.append(tree_attention.flex_mask(tree.seen_until))
        for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "q_num_blocks", "full_q_num_blocks"):
            assert torch.equal(*(getattr(mask, name) for mask in masks)), (lengths, name)
        at, none = torch.arange(len(tree.seen_until)), torch.tensor(0)
        assert torch.equal(masks[1].mask_mod(none, none, at[:, None], at[None]), tree_attention.dense_mask(tree.seen_until))


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(12, 2, 64, 64), (8, 2, 64, 64), (4, 4, 64, 64)])
def test_flex_attention_on_the_last_gpu(heads: tuple[int, int, int, int]) -> None:
    """Lines shorter than 128 tokens go through another of its kernels, where it knows the number of heads."""
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    for shape in ((3, [2], [[4, 1]]), (200, [20, 90], [[140, 30, 7], [60, 50]])):
        torch.manual_seed(0)
        tree = tree_attention.build_tree(*shape)
        lines = line(tree, heads, torch.float32)
        true = with_gradients(textbook, lines, tree, 0.125)
        there = [x.detach().to(device).requires_grad_() for x in lines]
        mine = with_gradients(tree_attention.flex_tree_attention, there, tree.to(device).block_mask, 0.125)
        for a, b in zip(mine, true, strict=True):
            assert float((a.cpu() - b).norm() / b.norm()) < 1e-2  # a wrong or missing token makes it about 1


def test_the_dense_mask_golden() -> None:
    """[p | q | a b | c]: p, q seen by all behind them; a by b; c by none of them."""
    tree = tree_attention.build_tree(1, [1], [[2, 1]])
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 1]]
    assert tree_attention.dense_mask(tree.seen_until).int().tolist() == expected


def test_what_must_not_be_seen_is_not_computed() -> None:
    """Scores computed for 16 completions of 100 tokens after a prompt of 1,000: near what is seen, far from the square of the line.

    Beyond what is seen: half of the squares on the diagonal (2 · 512²/2 and 16 · 100²/2), and up to a quarter by padding to like blocks.
    """
    tree = tree_attention.build_tree(0, [1000], [[100] * 16])
    computed = sum(part.queries.positions.numel() * part.keys.positions.shape[1] for part in tree.parts)
    seen = int(tree_attention.dense_mask(tree.seen_until).sum())
    diagonal = 512**2 + 16 * 100**2 // 2
    assert seen < computed < 1.25 * (seen + diagonal)
    assert computed < len(tree.seen_until) ** 2 / 2


@pytest.mark.parametrize(
    "setting", [{"softcap": 30.0}, {"s_aux": torch.zeros(4)}, {"dropout": 0.1}, {"is_causal": False}, {"sliding_window": 2}]
)
def test_attention_it_does_not_know_is_refused(setting: dict[str, Any]) -> None:
    x = torch.randn(1, 2, 3, 4)
    tree = tree_attention.build_tree(1, [1], [[1]])
    tree_attention.attention_forward(None, x, x, x, None, tree=tree, sliding_window=3)  # 3 tokens see each other in a window of 3
    with pytest.raises(ValueError, match=r"trainer\.layout=padded|attention_dropout to 0"):
        tree_attention.attention_forward(None, x, x, x, None, tree=tree, **setting)
    with pytest.raises(ValueError, match="does not hand its keyword arguments down"):
        tree_attention.attention_forward(None, x, x, x, None)


def test_a_window_of_the_longest_branch_hides_nothing() -> None:
    """``tree.longest`` is what a sliding window is compared with: the tokens of prefix, prompt and longest completion."""
    assert tree_attention.build_tree(2, [3, 4], [[5, 1], [0]]).longest == 2 + 3 + 5
