"""What a completion is worth. Import it as ``grpo.rewards``."""

if __name__ != "grpo.rewards":
    raise ImportError(
        f"this folder was imported as {__name__!r}; its import name is 'grpo.rewards' "
        "(run from another directory, or write `from grpo.rewards import …`)"
    )
