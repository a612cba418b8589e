"""Rewards for code: programs that a model wrote, run in a sandbox against the tests of their problem.

``code_reward`` is the function for recipes, ``CodeReward`` the object for Python. The tests stand in the column ``tests`` of a
problem (``cases.py``); ``grpo.data_code`` makes that column from well-known data sets.
"""

from grpo.rewards.code.cases import TestsError, check_tests, parse_tests
from grpo.rewards.code.extract import extract_program
from grpo.rewards.code.reward import CodeReward, Credit, code_reward
from grpo.rewards.code.verdict import Judgement, Verdict

__all__ = ["CodeReward", "Credit", "Judgement", "TestsError", "Verdict", "check_tests", "code_reward", "extract_program", "parse_tests"]
