"""Tasks of verifiers (https://github.com/PrimeIntellect-ai/verifiers) that verifiers runs itself: with tools, hooks, stops and runtimes.

verifiers runs a rollout as a program, its harness, that calls a model server. Here the model server is ours: an endpoint for chat
completions on 127.0.0.1, in which each call waits until the policy has sampled its turn. So control is turned round:
``VerifiersTask.start`` begins verifiers' rollout and returns the messages of its first model call; ``step`` answers the call that waits,
and returns what the next one says beyond the conversation so far, or the task's verdict when verifiers is done.

* ``environment``: what the toolkit sees.
* ``conversation``: one rollout's model calls and turns, between the environment's thread and verifiers'.
* ``server``: verifiers' event loop in a thread of its own, with the endpoint.
* ``harness``: the program that verifiers runs unless told otherwise, a loop of turns and tool calls in this process.

Only what verifiers documents is used: its configurations, ``Env.run_episode``, harnesses as plugins.
"""

from grpo.rollouts.verifiers_episodes.environment import SCORE, VerifiersTask

__all__ = ["SCORE", "VerifiersTask"]
