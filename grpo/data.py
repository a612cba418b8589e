"""Where problems come from: a function ``fn(split, seed=…, **arguments) -> list of rows`` and an order that can be resumed.

A row is a mapping of columns; ``prompt_key`` and ``answer_key`` of the configuration say which are the question and the gold
answer. ``split`` is ``"train"`` or ``"heldout"``; the two must not share a row, which is checked.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo.config import ConfigError
from grpo.types import Problem

_BEGINNING = 16  # tokens that a tokenizer may put before a text; one or two are usual
_LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")

Row = Mapping[str, Any]


# ---- sources of rows -------------------------------------------------------------------------------------------------


def sums(split: str, *, seed: int = 0, terms: int = 3, low: int = 1, high: int = 9, heldout: int = 120, size: int = 4000) -> list[Row]:
    """``low`` ≤ terms ≤ ``high`` to add up. A sum is held out by its own hash, so no seed and no order can leak it into training."""
    space = (high - low + 1) ** terms
    if heldout > space // 4:
        raise ConfigError("data.problems.heldout", f"{heldout} of only {space} possible sums", "raise high or terms, or lower heldout")
    share = max(0.1, 1.5 * heldout / space)  # a margin, since hashes fall unevenly
    rng = random.Random(f"sums/{split}/{seed if split == 'train' else 0}")
    wanted = min(size, space // 2) if split == "train" else heldout
    rows: dict[tuple[int, ...], Row] = {}
    for _ in range(100 * space):
        if len(rows) == wanted:
            break
        numbers = tuple(rng.randint(low, high) for _ in range(terms))
        if (_share(numbers) < share) == (split == "heldout"):
            rows.setdefault(numbers, {"question": " + ".join(map(str, numbers)), "answer": str(sum(numbers))})
    if split == "heldout" and len(rows) < heldout:
        raise ConfigError(
            "data.problems.heldout", f"only {len(rows)} of {heldout} sums can be held out", "raise high or terms, or lower heldout"
        )
    return list(rows.values())


def largest(split: str, *, seed: int = 0, terms: int = 3, share: float = 0.2, per_answer: int = 40) -> list[Row]:
    """``terms`` digits; the answer is the largest. ``share`` of them is held out, whatever their order.

    At most ``per_answer`` rows have the same answer: of all triples 27 % have a 9, and a policy that knows 6 to 9 is right in 78 % of
    them and stops trying.
    """
    if not (terms >= 1 and 0 < share < 1 and per_answer >= 1):
        found = f"terms={terms}, share={share}, per_answer={per_answer}"
        raise ConfigError("data.problems", found, "use terms ≥ 1, 0 < share < 1, per_answer ≥ 1")
    every = [digits for digits in itertools.product(range(10), repeat=terms) if (_share(digits) < share) == (split == "heldout")]
    random.Random(f"largest/{split}/{seed}" if split == "train" else "largest/heldout").shuffle(every)
    count: Counter[int] = Counter()
    rows: list[Row] = []
    for digits in every:
        if count[max(digits)] < per_answer:
            count[max(digits)] += 1
            rows.append({"question": ",".join(map(str, digits)), "answer": str(max(digits))})
    return rows


def _share(numbers: tuple[int, ...]) -> float:
    """A number in [0, 1) that depends on the problem alone, whatever the order of its terms: 3+4+5 and 5+4+3 go to the same split."""
    digest = hashlib.blake2b(json.dumps(sorted(numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def jsonl(split: str, *, train: str, heldout: str, seed: int = 0, limit: int = 0) -> list[Row]:
    """Two JSON-lines files, one object a line."""
    key, path = f"data.problems.{split}", Path({"train": train, "heldout": heldout}[split]).expanduser()
    if not path.is_file():
        raise ConfigError(key, f"the file {str(path)!r} does not exist (looked in {Path.cwd()})", "check the path")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(key, f"{path} is not UTF-8: {error}", "save it as UTF-8") from error
    rows: list[Row] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ConfigError(key, f"{path}, line {number} is not JSON: {error}", "correct the line, or take it out") from error
            if not isinstance(row, dict):
                raise ConfigError(
                    key, f"{path}, line {number} is a {type(row).__name__}, not an object", 'write one {"column": value, …} a line'
                )
            rows.append(row)
    return rows[:limit] if limit else rows


def huggingface(
    split: str,
    *,
    path: str,
    train: str = "train",
    heldout: str = "test",
    name: str | None = None,
    revision: str | None = None,
    seed: int = 0,
    limit: int = 0,
) -> list[Row]:
    """A data set of the Hugging Face hub, or a folder ``datasets.load_dataset`` understands; slices like ``train[:95%]`` work."""
    import datasets

    wanted = {"train": train, "heldout": heldout}[split]
    try:
        table = datasets.load_dataset(path, name, split=wanted, revision=revision)
    except Exception as error:
        raise ConfigError("data.problems.path", f"cannot load {path!r}, split {wanted!r}: {type(error).__name__}: {error}") from error
    return [dict(row) for row in (table.select(range(min(limit, len(table)))) if limit else table)]


# ---- rows → problems -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptFormat:
    """How a row becomes the text the policy sees. ``template`` holds columns in braces; empty: the prompt column as it is."""

    template: str = ""
    prompt_key: str = "question"
    answer_key: str = "answer"
    chat: Callable[[str], str] | None = None  # text of one user message → text with the model's chat template

    def problem(self, row: Row, split: str, number: int) -> Problem:
        needed = {"data.answer_key": self.answer_key} | ({} if self.template else {"data.prompt_key": self.prompt_key})
        for key, column in needed.items():
            if column not in row:
                raise ConfigError(
                    key, f"row {number} of the {split} split has no column {column!r}", f"its columns are: {', '.join(map(str, row))}"
                )
        prompt = _fill(self.template, row, split, number) if self.template else str(row[self.prompt_key])
        own = row.get("id")
        found = Problem(
            id=f"{split}/{number}" if own is None else str(own),
            prompt=self.chat(prompt) if self.chat else prompt,
            question=prompt,
            answer=str(row[self.answer_key]),
            columns=dict(row),
        )
        for name in ("id", "prompt", "answer"):
            if lone := _LONE_SURROGATE.search(getattr(found, name)):
                what = f"the {name} of row {number} of the {split} split holds half a character, {lone[0]!r}, which no tokenizer takes"
                raise ConfigError("data.problems", what, "repair it where the row comes from, or take it out")
        return found


def _fill(template: str, row: Row, split: str, number: int) -> str:
    """Columns in single braces; everything else, braces of LaTeX or JSON in the row included, stays as it is."""
    try:
        return template.format_map(row)
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        raise ConfigError(
            "data.template",
            f"cannot be filled with row {number} of the {split} split: {type(error).__name__}: {error}",
            f"its columns are {', '.join(map(str, row))}; a brace that is meant as a brace is written twice: {{{{ }}}}",
        ) from error


def load_problems(rows: Sequence[Row], split: str, prompt_format: PromptFormat) -> list[Problem]:
    """All problems of a split; ids must be unique, since groups are found by them."""
    if not rows:
        raise ConfigError("data.problems", f"the {split} split has no rows", "check the source of the problems, and its limit")
    problems = [prompt_format.problem(row, split, number) for number, row in enumerate(rows)]
    ids = [p.id for p in problems]
    if len(set(ids)) < len(ids):
        twice = next(i for n, i in enumerate(ids) if i in ids[:n])
        raise ConfigError(
            "data.problems", f"two rows of the {split} split have the id {twice!r}", "make the column `id` unique, or leave it out"
        )
    return problems


def check_prompts(problems: Sequence[Problem], split: str, num_tokens: Callable[[str], int], room: int, max_new_tokens: int) -> None:
    """Rows that no engine can sample: an error at the start, not in the step that comes to them.

    Args:
        num_tokens: of a prompt.
        room: tokens that an engine has for a prompt and its completion together.

    Raises:
        ConfigError: naming them.
    """
    unfit = []
    for problem in problems:
        # A token is a byte or more, but for those that a tokenizer begins a text with: few prompts need be looked at closely. Where a
        # normaliser lengthens a text, what slips through is refused by the engine when its turn comes.
        if problem.prompt.strip() and len(problem.prompt.encode()) + _BEGINNING + max_new_tokens <= room:
            continue
        length = num_tokens(problem.prompt)
        if not length or length + max_new_tokens > room:
            unfit.append(f"{problem.id!r} ({length:,} tokens)")
    if unfit:
        raise ConfigError(
            "data.problems",
            f"{len(unfit)} of {len(problems)} prompts of the {split} split are empty, or do not fit, with "
            f"rollout.max_new_tokens={max_new_tokens}, in the {room:,} tokens of the engine: "
            + ", ".join(unfit[:5])
            + (", …" if unfit[5:] else ""),
            "take these rows out or shorten them, lower rollout.max_new_tokens, or raise max_model_len in rollout.engine_args",
        )


def check_disjoint(train: Sequence[Problem], heldout: Sequence[Problem]) -> None:
    """Raises ConfigError when a held-out prompt is also trained on: its score would be a lie."""
    seen = {p.prompt for p in train}
    if shared := [p for p in heldout if p.prompt in seen]:
        raise ConfigError(
            "data.problems",
            f"{len(shared)} of {len(heldout)} held-out problems are also in the training split, e.g. {shared[0].id}",
            "hold out other rows",
        )


class ProblemSource:
    """An endless, shuffled stream of problems whose position is one number: epoch ``e`` has the order of (seed, e)."""

    def __init__(self, problems: Sequence[Problem], seed: int) -> None:
        self.problems: Sequence[Problem] = list(problems)
        self.seed, self.position = seed, 0

    def take(self, count: int, besides: Collection[str] = ()) -> list[Problem]:
        """The next ``count`` problems, all different.

        Across an epoch's end a problem may come again: it is passed over, and the new epoch goes without it.

        Args:
            besides: ids of further problems to pass over. Where that leaves fewer, these are taken; where none, the place stays.

        Raises:
            ConfigError: there are fewer problems than that at all.
        """
        if count > len(self.problems):
            raise ConfigError(
                "rollout.problems_per_step", f"is {count}, but the training split has only {len(self.problems)} problems", "lower it"
            )
        count = min(count, sum(problem.id not in besides for problem in self.problems) if besides else count)
        taken: dict[str, Problem] = {}
        stream = self._from(self.position)
        while len(taken) < count:
            problem = next(stream)
            self.position += 1
            if problem.id not in besides:
                taken.setdefault(problem.id, problem)
        return list(taken.values())

    def _from(self, position: int) -> Iterator[Problem]:
        first = position // len(self.problems)
        for epoch in itertools.count(first):
            order = list(range(len(self.problems)))
            random.Random(f"{self.seed}/{epoch}").shuffle(order)
            skip = position - epoch * len(self.problems) if epoch == first else 0
            for index in order[skip:]:
                yield self.problems[index]
