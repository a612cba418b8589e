"""The proof that an engine samples with the weights that were sent. A sync that is not proven stops the run.

Three layers, because each is blind to what the next one sees:

1. **Bytes** (every sync). Each tensor is hashed before it leaves and after it has arrived: what is missing, stale, mixed up or
   damaged on the way shows in the hash, at any learning rate. The version is read back from every engine.
2. **The model itself** (every sync). The parameters are read back out of the loaded model and hashed again, so that a tensor
   which arrived and was not applied shows too: see ``grpo.rollouts.readback`` for vLLM, whose CPU build keeps them packed.
3. **Log-probs** (at the start). ``self_test`` changes single tensors by as much as they are large and holds the engine's log-probs
   against the trainer's. That reaches what can not be read back – quantised or derived weights, experts, shards of an
   unknown cut – though one tensor of each kind alone, and only with large changes: after a step at a learning rate of 1e-6 the
   log-probs of a stale engine differ from the trainer's by 0.044 in the mean, those of the right one by 0.043.

``probe_difference`` is layer 3's gauge for every step. It proves nothing alone; a jump in it says that something is wrong.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import xxhash

from grpo.rollouts.base import Engine, SyncReport
from grpo.rollouts.weights import Spec, shown
from grpo.types import Completion, Request, Sampling

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Digests = Mapping[str, str]
Score = Callable[[Mapping[str, "Tensor"], Sequence[Completion]], Sequence[Sequence[float]]]
"""The trainer's log-probs of the completions' tokens under given weights, at the temperature they were sampled with."""

_CHANGE = 2.0  # of a tensor's root mean square: alone, a stale tensor of SmolLM2 is then off by 0.8 a token or more, and noise is 0.05
_LEAST_SIZE = 0.02  # for tensors that are all zero, such as fresh biases
_TOGETHER = 5  # tensors changed in one load of the self-test: of SmolLM2's 11 kinds, 3 loads
_SEEN = 5.0  # a change is seen if it moves the log-probs this many times as much as the numerical noise


class WeightProofError(RuntimeError):
    """An engine does not hold the weights that were sent: nothing it samples would be what the trainer takes it for."""


def digest(tensor: Tensor) -> str:
    """128 bits over type, shape and bytes. XXH3 checks against faults, not fraud: 269 MB take 0.02 s, and BLAKE2b 0.2 s."""
    import torch

    spec = Spec.of(tensor)
    plain = tensor.detach().cpu().contiguous()
    hashed = xxhash.xxh3_128(f"{spec.dtype}{list(spec.shape)}".encode())
    if plain.numel():
        hashed.update(plain.view(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def digest_of_values(tensor: Tensor) -> str:
    """The same with −0, and numbers too small to be normal, taken for 0: read back through a product, both are lost."""
    import torch

    if not has_lost_values(tensor):
        return digest(tensor)
    values = tensor.detach()
    lost = values == 0 if values.dtype is torch.float16 else values.abs() < torch.finfo(values.dtype).tiny  # float16's products keep them
    return digest(values.masked_fill(lost, 0))


def has_lost_values(tensor: Tensor) -> bool:
    """Whether there may be such numbers: a zero of any kind, or an exponent without a bit.

    Not asked of numbers of one byte, which no layer is read back in.
    """
    import torch

    exponents = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00, torch.float32: 0x7F800000, torch.float64: 0x7FF << 52}
    if tensor.dtype not in exponents or not tensor.numel():
        return False
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.detach().contiguous().view(integers) & exponents[tensor.dtype]
    return int(bits.min()) == 0


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a tensor along one dimension. ``Part(0, 128, 64)``: rows 128 to 191."""

    dim: int
    start: int
    length: int

    def of(self, tensor: Tensor) -> Tensor:
        return tensor.narrow(self.dim, self.start, self.length)


@dataclass(kw_only=True)
class Passing:
    """Notes on weights as they pass by."""

    digests: dict[str, str] = field(default_factory=dict)
    num_bytes: int = 0

    def passing(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            self.note(name, tensor)
            yield name, tensor

    def note(self, name: str, tensor: Tensor) -> None:
        self.digests[name] = digest(tensor)
        self.num_bytes += tensor.numel() * tensor.element_size()


@dataclass(kw_only=True)
class Arrivals(Passing):
    """The same on their way into a model, and what it should then hold.

    Args:
        dtypes: types the model holds its tensors in, where they may differ from those that come.
        parts: what of them is read back, each a part of the one before, where that is not the whole.
    """

    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    parts: Mapping[str, Sequence[Part]] = field(default_factory=dict)
    to_hold: dict[str, str] = field(default_factory=dict)  # the values as they should be read back

    def note(self, name: str, tensor: Tensor) -> None:
        super().note(name, tensor)
        held = tensor
        for part in self.parts.get(name, ()):
            held = part.of(held)
        held = held.to(self.dtypes.get(name, tensor.dtype))
        same = held.shape == tensor.shape and held.dtype == tensor.dtype and not has_lost_values(tensor)
        self.to_hold[name] = self.digests[name] if same else digest_of_values(held)

    def check_held(self, held: Mapping[str, Sequence[str]]) -> int:
        """Compare with what was read back from the model; returns how many tensors could be.

        Args:
            held: tensor → ``digest_of_values`` of every copy the model computes with (a tied one has two).

        Raises:
            WeightProofError: the model holds something else.
        """
        common = held.keys() & self.to_hold.keys()
        stale = [name for name in common if set(held[name]) != {self.to_hold[name]}]
        if stale:
            raise WeightProofError(
                f"{len(stale)} of {len(common)} tensors arrived and are not what the engine computes with: {shown(stale)}\n"
                "  → the engine did not apply them, a fault in it or in how it was called; or they hold NaN or infinity, which cannot be\n"
                "    read back out of packed layers: look at policy/grad_norm of the last steps"
            )
        return len(common)


def check_sent(sent: Digests, version: int, report: SyncReport, engine: str) -> None:
    """Hold what an engine reports against what was sent.

    Raises:
        WeightProofError: another version, another set of tensors, or another tensor.
    """
    if report.version != version:
        raise WeightProofError(f"{engine} says it holds version {report.version} of the weights, and version {version} was sent")
    problems = [
        f"{len(names)} {what}: {shown(names)}"
        for what, names in (
            ("did not arrive", sent.keys() - report.digests.keys()),
            ("were never sent", report.digests.keys() - sent.keys()),
            ("arrived with other values", {name for name in sent.keys() & report.digests.keys() if sent[name] != report.digests[name]}),
        )
        if names
    ]
    if problems:
        raise WeightProofError(
            f"{engine} did not get the weights that were sent as version {version} ({len(sent)} tensors)\n  "
            + "\n  ".join(problems)
            + "\n  → the transfer lost or changed them; see docs/fault-tolerance.md"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfTest:
    """What ``self_test`` measured, in mean |Δ log-prob| a token; every entry of ``seen`` was told apart from stale weights.

    ``SelfTest(noise=0.03, seen={"model.norm.weight": 2.1}, unseen=(), loads=7, report=SyncReport(…))``
    """

    noise: float  # engine against trainer, same weights
    seen: Mapping[str, float]  # tensor → how far the log-probs would be off, had it not been applied
    unseen: tuple[str, ...]  # changed, and the log-probs hardly moved: an expert that no token of the probe went through
    loads: int
    report: SyncReport  # of the weights that the engines were left with

    def summary(self) -> str:
        text = (
            f"weights: {len(self.seen)} tensors, one of each kind, were changed and seen by every engine; "
            f"engine against trainer {self.noise:.1e} a token, one stale tensor {min(self.seen.values(), default=math.nan):.1e} or more"
        )
        return text + (f"; without effect on the probe: {shown(self.unseen)}" if self.unseen else "")

    def figures(self) -> dict[str, Any]:
        """For a file."""
        return {"noise": self.noise, "stale_tensor": dict(self.seen), "without_effect": list(self.unseen), "loads": self.loads}


def self_test(
    engine: Engine,
    weights: Mapping[str, Tensor],
    score: Score,
    requests: Sequence[Request],
    sampling: Sampling,
    version: int = 0,
    tolerance: float = 0.25,
) -> SelfTest:
    """Prove the whole path from the trainer's tensors to every engine's log-probs, with changes too large to miss.

    One tensor of every kind (its name without the layer's number; another layer for each kind) is changed by twice its own size, and
    loaded. Every engine's log-probs of what it then samples must agree with the trainer's under the changed weights. A load costs
    more than a score, so a few tensors are changed at a time, and the trainer says for each of them how far the log-probs would be
    off, had this one stayed as it was and the others changed. Where that does not tell every one of them apart, each is changed
    alone. All tensors changed at once come last, then the weights themselves, with which the engine is left.

    Args:
        score: the trainer's log-probs; it must leave the policy as it was.
        requests: the probe. Prompts longer than a block of the prefix cache (32 tokens) test that it is dropped.
        sampling: a few tokens at the temperature that ``score`` assumes.
        version: of the weights, with which the engine is left. The loads between carry negative versions.
        tolerance: the largest mean |Δ log-prob| allowed between engine and trainer with the same weights (bfloat16: 0.03 to 0.05).

    Raises:
        WeightProofError: naming the tensor and the differences.
    """
    trial = _Trial(engine, dict(weights), score, requests, sampling)
    trial.noise = max(trial.difference({}, "nothing was changed"), 1e-6)
    if trial.noise > tolerance:
        raise WeightProofError(
            f"with the same weights, engine and trainer differ by {trial.noise:.3g} a token in the mean log-prob; "
            f"{tolerance:g} is allowed\n"
            "  → they do not compute the same model: compare dtype, rope settings, quantisation and temperature of the two"
        )
    seen: dict[str, float] = {}
    unseen: list[str] = []
    for names in few_at_a_time(one_of_each_kind(weights)):
        together = trial.told_apart(names)
        for name in names:
            moved = together[name] if together else trial.alone(name)
            if moved > _SEEN * trial.noise:
                seen[name] = moved
            else:
                unseen.append(name)
    trial.difference({name: changed(name, tensor, 0.1) for name, tensor in weights.items()}, "every tensor was changed")
    trial.difference({}, "every tensor was changed back", version)
    return SelfTest(noise=trial.noise, seen=seen, unseen=tuple(unseen), loads=trial.loads, report=trial.report)


class _Trial:
    """Engines and trainer under weights of which some are changed."""

    def __init__(self, engine: Engine, weights: dict[str, Tensor], score: Score, requests: Sequence[Request], sampling: Sampling) -> None:
        self._engine, self._weights, self._score = engine, weights, score
        self._requests, self._sampling = requests, sampling
        self.noise = 0.0  # 0: not known yet
        self.loads = 0
        self.report: SyncReport

    def difference(self, changes: Mapping[str, Tensor], what: str, version: int | None = None) -> float:
        """Between trainer and the worst engine, with these changes to the weights."""
        answers = self._answers(changes, version)
        under = self._under(changes, answers)
        apart = self._apart(answers, under)
        self._check(apart, _moved(under, self._under({}, answers)) if changes else [0.0] * len(apart), what)
        return max(apart)

    def alone(self, name: str) -> float:
        """Change one tensor; how far that moved the trainer's log-probs.

        Raises:
            WeightProofError: those of an engine did not move with them.
        """
        changes = {name: changed(name, self._weights[name])}
        answers = self._answers(changes)
        under = self._under(changes, answers)
        moved = _moved(under, self._under({}, answers))
        self._check(self._apart(answers, under), moved, f"{name} was changed")
        return min(moved)

    def told_apart(self, names: Sequence[str]) -> dict[str, float]:
        """Change several; for each how far the trainer's log-probs are from those that it has without that one change.

        Empty if that does not prove that every engine has applied every one of them.
        """
        if len(names) == 1:
            return {}
        changes = {name: changed(name, self._weights[name]) for name in names}
        answers = self._answers(changes)
        under = self._under(changes, answers)
        apart = self._apart(answers, under)
        without = {name: {other: tensor for other, tensor in changes.items() if other != name} for name in names}
        stale = {name: _moved(under, self._under(others, answers)) for name, others in without.items()}
        for moved in stale.values():
            if any(a > self._bound(m) or m <= _SEEN * self.noise for a, m in zip(apart, moved, strict=True)):
                return {}
        return {name: min(moved) for name, moved in stale.items()}

    def _answers(self, changes: Mapping[str, Tensor], version: int | None = None) -> list[list[Completion]]:
        """What every engine samples with the changed weights."""
        self.loads += 1
        self.report = self._engine.load_weights({**self._weights, **changes}, -self.loads if version is None else version)
        return self._engine.probe(self._requests, self._sampling)

    def _under(self, changes: Mapping[str, Tensor], answers: Sequence[Sequence[Completion]]) -> list[Sequence[Sequence[float]]]:
        """The trainer's log-probs of every engine's answers."""
        scores = iter(self._score({**self._weights, **changes}, [completion for own in answers for completion in own]))
        return [[next(scores) for _ in own] for own in answers]

    def _apart(self, answers: Sequence[Sequence[Completion]], under: Sequence[Sequence[Sequence[float]]]) -> list[float]:
        """Every engine against the trainer."""
        return [mean_difference([c.logprobs for c in own], theirs) for own, theirs in zip(answers, under, strict=True)]

    def _bound(self, moved: float) -> float:
        """How far an engine may be from the trainer: as much as numerical noise explains."""
        return max(_SEEN * self.noise, moved / _SEEN)

    def _check(self, apart: Sequence[float], moved: Sequence[float], what: str) -> None:
        for number, (difference, change) in enumerate(zip(apart, moved, strict=True)):
            if self.noise and difference > self._bound(change):
                raise WeightProofError(
                    f"after {what}, the log-probs of engine {number} differ from the trainer's by {difference:.3g} a token in the "
                    f"mean; with the same weights they differ by {self.noise:.3g}, and the change itself moved them by {change:.3g}\n"
                    "  → the engine does not compute with the weights it was sent; see docs/fault-tolerance.md"
                )


def _moved(one: Sequence[Sequence[Sequence[float]]], other: Sequence[Sequence[Sequence[float]]]) -> list[float]:
    """The trainer's log-probs under one set of changes against those under another, for every engine's answers."""
    return [mean_difference(a, b) for a, b in zip(one, other, strict=True)]


def one_of_each_kind(names: Iterable[str]) -> list[str]:
    """One tensor of each kind, taken from one layer after another: ``…layers.0.q_proj``, ``…layers.1.k_proj``, …"""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(re.sub(r"\d+", "*", name), []).append(name)
    return [members[number % len(members)] for number, members in enumerate(kinds.values())]


def few_at_a_time(names: Sequence[str]) -> list[list[str]]:
    """Tensors of layers, five at a time; those at the ends of the model, which move the log-probs far more, by themselves."""
    of_layers = [name for name in names if re.search(r"\d", name)]
    at_the_ends = [name for name in names if name not in of_layers]
    together = [of_layers[start : start + _TOGETHER] for start in range(0, len(of_layers), _TOGETHER)]
    return [names for names in [*together, at_the_ends] if names]


def changed(name: str, tensor: Tensor, size: float = _CHANGE) -> Tensor:
    """The tensor plus ± ``size`` times its root mean square, the signs drawn from its name: the same on every machine."""
    import torch

    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    signs = torch.randint(0, 2, tensor.shape, generator=generator).mul_(2).sub_(1)
    scale = size * max(float(tensor.detach().float().square().mean().sqrt()), _LEAST_SIZE)
    return (tensor.detach() + scale * signs.to(tensor.device, tensor.dtype)).to(tensor.dtype)


def mean_difference(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> float:
    """Mean |Δ| over all tokens of all completions; infinite if one is NaN."""
    apart = [abs(a - b) for one, other in zip(ours, theirs, strict=True) for a, b in zip(one, other, strict=True)]
    return math.inf if any(map(math.isnan, apart)) else sum(apart) / max(len(apart), 1)


def probe_difference(
    engine: Engine, score: Callable[[Sequence[Completion]], Sequence[Sequence[float]]], requests: Sequence[Request], sampling: Sampling
) -> float:
    """Mean |Δ log-prob| a token between every engine and the trainer on a fixed probe: the gauge ``sync/probe_logprob_diff``.

    Of the engine that differs most. ``requests`` carry fixed seeds, so that two steps differ by their weights alone.
    """
    answers = engine.probe(requests, sampling)
    return max(mean_difference([c.logprobs for c in completions], score(completions)) for completions in answers)
