"""Where completions come from. Import it as ``grpo.rollouts``."""

if __name__ != "grpo.rollouts":
    raise ImportError(
        f"this folder was imported as {__name__!r}; its import name is 'grpo.rollouts' "
        "(run from another directory, or write `from grpo.rollouts import …`)"
    )
