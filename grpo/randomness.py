"""The random states of this process: Python's, NumPy's, torch's. Sampling does not draw from them – a token's randomness is a hash of
(seed, index, position) – but a user's reward, objective or advantage may."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def seed_all(seed: int) -> None:
    """Start every generator from one number."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)  # those of all GPUs too


def states() -> dict[str, Any]:
    """Every state, as what ``torch.load(weights_only=True)`` takes."""
    twister: Any = np.random.get_state(legacy=True)  # NumPy's types allow other shapes of it
    name, keys, *rest = twister
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def restore(saved: Mapping[str, Any]) -> None:
    """Go on where ``states`` was called. GPUs that there were then and are not now are passed over."""
    random.setstate(saved["python"])
    np.random.set_state(saved["numpy"])
    torch.set_rng_state(saved["torch"])
    for device, state in enumerate(saved["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, device)
