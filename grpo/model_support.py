"""Which layouts a model allows, said from its configuration, and a check of that on two real rollouts.

``padded`` is right for every causal model. A line of several rollouts is right only where nothing but attention takes a token's
neighbours into account, where attention is plain, and where positions come from ``position_ids``. A model that breaks one of these
would compute something else without a word, so it is named here and laid out as ``padded``.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from grpo import tree_attention
from grpo.layouts import LayoutName, ModelInputs, lay_out
from grpo.types import Rollout

RECURRENT = re.compile(r"(^|_)(mamba|ssm|lru|state_size|time_step|conv_kernel|conv_L_cache|conv1d)(_|$)|block_types?$")
INDEXED = re.compile(r"^(index_topk|index_n_heads|sparse_attention_config)$")
WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "attention_window")
BY_TYPE = {  # what a configuration does not say
    **dict.fromkeys(("rwkv", "xlstm"), "it has recurrent layers"),
    **dict.fromkeys(("bloom", "mpt"), "its positions come from the place in the row (ALiBi), not from position_ids"),
    **dict.fromkeys(("gpt_oss", "granite_swa", "granitemoe_swa", "hy_v4", "mimo_v2_flash"), "its attention has sinks"),
}

# The mean |Δ log-prob| in nats a token up to which two layouts agree. SmolLM2-135M in bf16 on random tokens: 0.05, and 0.3 with a leak.
AGREE = {torch.float64: 1e-7, torch.float32: 1e-4, torch.bfloat16: 0.15, torch.float16: 0.03}


@dataclass(frozen=True, slots=True, kw_only=True)
class Support:
    """What a model allows. ``Support(layouts=("padded", "packed", "shared_prompt"), max_tokens=4096, reason="its sliding window …")``"""

    layouts: tuple[LayoutName, ...]
    reason: str = ""  # why not every layout, or not for rollouts of any length
    max_tokens: int | None = None  # the longest rollout (input tokens) of a batch that layouts other than padded are right for


def supported(config: Any) -> Support:
    """The layouts that the model of this transformers configuration allows.

    Raises:
        ValueError: the model is no causal language model at all.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{_type(config)} is an encoder-decoder model; the policy must be a causal (decoder-only) language model")
    config = config.get_text_config() if hasattr(config, "get_text_config") else config  # of a multimodal model: its language model
    if why := _obstacle(config):
        return Support(layouts=("padded",), reason=why)
    limits = [*_windows(config), *_rope_limits(config)]
    max_tokens, why = min(limits, default=(None, ""))
    return Support(layouts=("padded", "packed", "shared_prompt"), reason=why, max_tokens=max_tokens)


def _obstacle(config: Any) -> str | None:
    """Why no other layout than padded is right, whatever the batch."""
    if known := BY_TYPE.get(_type(config)):
        return known
    layer_types = set(getattr(config, "layer_types", None) or ())
    if other := layer_types - {"full_attention", "sliding_attention", "chunked_attention"}:
        return f"it has {', '.join(sorted(other))} layers"
    settings = {name: value for name, value in vars(config).items() if value}
    if names := sorted(filter(RECURRENT.search, settings)):
        return f"it has recurrent or convolutional layers ({', '.join(names)})"
    if names := sorted(filter(INDEXED.search, settings)):
        return f"its attention chooses among the tokens of the row ({', '.join(names)})"
    if settings.get("alibi"):
        return BY_TYPE["bloom"]
    if settings.get("attn_logit_softcapping"):
        return "its attention scores have a soft cap"
    if settings.get("use_bidirectional_attention"):
        return "its attention is not causal"
    if settings.get("expert_capacity"):
        return "its experts have a capacity, so what one token gets depends on the others of its row"
    return None


def _windows(config: Any) -> list[tuple[int, str]]:
    """A window that no rollout outgrows hides nothing."""
    named = {name: getattr(config, name, None) for name in WINDOWS}
    if not getattr(config, "use_sliding_window", True):
        named["sliding_window"] = None
    return [(size, f"its {name} is {size} tokens") for name, size in named.items() if isinstance(size, int) and size > 0]


def _rope_limits(config: Any) -> list[tuple[int, str]]:
    """Rotary frequencies that change with the longest row of a forward pass, beyond the length the model was first trained on."""
    parameters = getattr(config, "rope_parameters", None) or {}
    limits = []
    for kind in [p for p in (parameters, *parameters.values()) if isinstance(p, dict)]:  # one for all, or one a layer type
        if (rope_type := kind.get("rope_type")) in ("dynamic", "longrope"):
            size = kind.get("original_max_position_embeddings") or config.max_position_embeddings
            limits.append((size, f"its {rope_type} rotary frequencies, beyond {size} tokens, change with the longest row computed with it"))
    return limits


def _type(config: Any) -> str:
    return str(getattr(config, "model_type", "") or type(config).__name__)


# ---------------------------------------------------------------- one model


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutPlan:
    """The layout that a model's batches get, and the attention that goes with it."""

    layout: LayoutName
    own_attention: str  # the model's: what padded rows need
    max_tokens: int | None = None
    reason: str = ""  # of max_tokens

    def choose(self, model: Any, rollouts: Sequence[Rollout]) -> LayoutName:
        """The layout of this batch; the model's attention is set to match. A rollout that is too long makes it ``padded``."""
        layout = self.layout
        if layout != "padded" and self.max_tokens is not None and max(map(_num_inputs, rollouts), default=0) > self.max_tokens:
            warnings.warn(
                f"a batch with rollouts of more than {self.max_tokens} tokens is laid out as padded, not {layout}: {self.reason}",
                stacklevel=2,
            )
            layout = "padded"
        attention = self.own_attention if layout == "padded" else tree_attention.NAME
        if model.config._attn_implementation != attention:
            model.set_attn_implementation(attention)
        return layout


def plan_layout(model: Any, layout: LayoutName) -> LayoutPlan:
    """``layout`` if the model allows it, else ``padded`` and a warning that says why.

    Raises:
        ValueError: the model is no causal language model at all.
    """
    support = supported(model.config)
    if layout != "padded":
        tree_attention.register()
        why = support.reason if layout not in support.layouts else _missing(model)
        if why:
            warnings.warn(f"trainer.layout={layout} is not possible for {_named(model)}: {why}; using padded", stacklevel=2)
            layout = "padded"
    return LayoutPlan(layout=layout, own_attention=model.config._attn_implementation, max_tokens=support.max_tokens, reason=support.reason)


def check_layout(model: Any, plan: LayoutPlan, rollouts: Sequence[Rollout], logprobs: Callable[[ModelInputs], Tensor]) -> LayoutPlan:
    """The plan, if the model gives the same log-probs in it as in padded rows on two of these rollouts; else one for padded.

    Padded rows are right by definition, so a disagreement costs speed, not correctness: it warns, loudly, and goes on.

    Args:
        logprobs: of ``ModelInputs.targets`` by this model, in nats, without gradient.
    """
    two = _siblings(rollouts)
    layout = plan.choose(model, two)
    if layout == "padded" or not two:
        return plan
    rows = [two] if len({r.completion.prompt_ids for r in two}) == 1 else [[r] for r in two]
    bound = AGREE[model.dtype]
    try:
        mine = logprobs(lay_out(rows, layout))
    except ValueError as error:  # the attention was asked for something it does not do
        why = str(error).partition(": set trainer")[0]
    else:
        padded = replace(plan, layout="padded")
        padded.choose(model, two)
        difference = float((mine - logprobs(lay_out(rows, "padded"))).abs().mean())
        plan.choose(model, two)
        if difference <= bound:
            return plan
        why = f"the log-probs of two rollouts are {difference:.2g} nats a token off those in padded rows (rounding: < {bound:.0e})"
    warnings.warn(f"trainer.layout={layout} is wrong for {_named(model)}: {why}; using padded", stacklevel=2)
    fallback = replace(plan, layout="padded")
    fallback.choose(model, two)
    return fallback


def without_noise(model: nn.Module) -> tuple[str, ...]:
    """Switch off dropout and router jitter in place: a ratio of log-probs under two draws of noise means nothing.

    Returns:
        The names of what was switched off. Configurations are left as they are.
    """
    found = []
    for path, module in model.named_modules():
        names = ["p"] if isinstance(module, nn.Dropout) else [n for n in vars(module) if re.search("dropout|pdrop|jitter", n)]
        for name in names:
            if isinstance(value := getattr(module, name), float) and value:
                setattr(module, name, 0.0)
                found.append(f"{path}.{name}" if path else name)
    return tuple(found)


def _missing(model: Any) -> str | None:
    """What the model's code lacks, whatever its configuration says."""
    if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        return "it takes no position_ids"
    if not (model._supports_attention_backend and model._can_set_attn_implementation()):
        return "its attention can not be replaced (it does not use transformers' AttentionInterface)"
    return None


def _siblings(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Two rollouts, of one prompt if there are any: those have the most to leak to each other."""
    longest_first = sorted(rollouts, key=lambda r: -len(r.completion.token_ids))
    by_prompt: dict[tuple[int, ...], list[Rollout]] = {}
    for rollout in longest_first:
        by_prompt.setdefault(rollout.completion.prompt_ids, []).append(rollout)
    return next((siblings[:2] for siblings in by_prompt.values() if len(siblings) > 1), longest_first[:2])


def _num_inputs(rollout: Rollout) -> int:
    return len(rollout.completion.prompt_ids) + len(rollout.completion.token_ids) - 1


def _named(model: Any) -> str:
    return f"{type(model).__name__} ({model.config.name_or_path})" if model.config.name_or_path else type(model).__name__
