"""Rollouts of several turns: which tokens they hold, whose they are, when they end, and what an environment's failure costs."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from grpo.config import ConfigError
from grpo.rollout_table import groups_of, rollout_table
from grpo.rollouts.base import Begun, Close, Engine, Job
from grpo.rollouts.dialogue import PlainText
from grpo.rollouts.environments import Done, Environment, Message, SingleTurn
from grpo.rollouts.episode import Dialogue, Episode, turn_seed
from grpo.rollouts.guard import MAX_TURNS
from grpo.rollouts.scripted import ScriptedEngine
from grpo.toy import Characters
from grpo.types import FAILURE, Completion, FinishReason, Group, Outcome, Problem, Sampling, Score

PROBLEM = Problem(id="p", prompt="Q: ", answer="7")


class Replies:
    """Answers with the texts it is given, one a turn; then it is done."""

    def __init__(self, *texts: str) -> None:
        self.left = list(texts)
        self.seen: list[str] = []

    def start(self, problem: Problem) -> Sequence[Message]:
        return (Message("text", problem.prompt),)

    def step(self, completion: Completion) -> Sequence[Message] | Done:
        self.seen.append(completion.text)
        return (Message("text", self.left.pop(0)),) if self.left else Done({"turns": len(self.seen)})


def episode(
    environment: Callable[[], Environment], max_new_tokens: int = 100, seed: int = 5, dialogue: Dialogue | None = None
) -> Episode:
    return Episode(PROBLEM, 3, seed, environment, dialogue or PlainText(Characters()), max_new_tokens)


def turn_of(job: Job, text: str, version: int = 0, reason: FinishReason = FinishReason.stop) -> Completion:
    """What an engine makes of a job that samples ``text``."""
    return Completion(
        problem_id=job.request.problem_id,
        index=job.index,
        prompt_ids=job.request.prompt_ids,
        token_ids=tuple(map(ord, text)),
        text=text,
        logprobs=tuple(-0.5 - i for i in range(len(text))),
        policy_versions=(version,) * len(text),
        finish_reason=reason,
    )


def play(episodes: Sequence[Episode], engine: Engine, sampling: Sampling) -> None:
    """Sample episodes to their end with one call of an engine, as a collector does."""
    ready, running = list(enumerate(episodes)), dict(enumerate(episodes))
    for one in episodes:
        one.start()

    def feed(idle: bool) -> Sequence[Job] | Close:
        jobs = [one.job(number) for number, one in ready]
        ready.clear()
        return jobs if running else Close.finish

    for finished in engine.serve(feed, sampling):
        for number, turn in finished:
            assert isinstance(turn, Completion)
            if running[number].advance(turn):
                del running[number]
            else:
                ready.append((number, running[number]))


# ---------------------------------------------------------------- the sequence


def test_a_rollout_is_one_sequence_of_turns_and_what_stands_between_them() -> None:
    """Prompt "Q: ", turn "ab", environment "[x]", turn "c", environment "[yz]", turn "d"."""
    one = episode(lambda: Replies("[x]", "[yz]"))
    one.start()
    prompts = []
    for version, text in enumerate(("ab", "c", "d")):
        job = one.job(version)
        prompts.append("".join(map(chr, job.request.prompt_ids)))
        over = one.advance(turn_of(job, text, version))
        assert over == (text == "d") and one.num_turns == version + 1
    assert prompts == ["Q: ", "Q: ab[x]", "Q: ab[x]c[yz]"]
    whole = one.completion
    assert whole is not None
    assert "".join(map(chr, whole.prompt_ids)) == "Q: "
    assert "".join(map(chr, whole.token_ids)) == "ab[x]c[yz]d"
    assert "".join("s" if own else "." for own in whole.sampled) == "ss...s....s"
    assert whole.logprobs == (-0.5, -1.5, 0, 0, 0, -0.5, 0, 0, 0, 0, -0.5)
    assert whole.policy_versions == (0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 2), "an environment's tokens have the version of the turn before them"
    assert whole.finish_reason is FinishReason.stop
    assert whole.text == "ab\nc\nd"
    assert whole.transcript == (("ab", True), ("[x]", False), ("c", True), ("[yz]", False), ("d", True))
    assert (whole.num_sampled, whole.num_turns, "".join(map(chr, whole.sampled_ids))) == (4, 3, "abcd")
    assert one.scores == {"turns": Score(value=3.0)}


def test_a_single_turn_is_the_engines_completion_itself() -> None:
    one = episode(SingleTurn)
    one.start()
    turn = turn_of(one.job(0), "7", version=4)
    assert one.advance(turn)
    assert one.completion == turn
    assert one.scores == {}


def test_turns_draw_from_different_seeds_that_depend_on_the_rollouts_alone() -> None:
    requests = []
    for _ in range(2):
        one = episode(lambda: Replies("x", "x"), seed=5)
        one.start()
        for _ in range(3):
            job = one.job(len(requests))
            assert job.index == 3
            requests.append(job.request.seed)
            one.advance(turn_of(job, "a"))
    assert requests[:3] == requests[3:]
    assert requests[0] == 5, "the first turn is that of a rollout of one turn"
    assert len(set(requests)) == 3 and all(0 <= seed < 2**63 for seed in requests)
    assert turn_seed(5, 1) != turn_seed(6, 1)


def test_a_paused_turn_goes_on_and_the_next_begins_with_nothing() -> None:
    one = episode(lambda: Replies("x"))
    one.start()
    begun = Begun(token_ids=(97,), logprobs=(-0.5,), policy_versions=(0,))
    one.begun = begun
    job = one.job(0)
    assert job.begun == begun and job.request.prompt_ids == one.job(1).request.prompt_ids
    one.advance(turn_of(job, "ab"))
    assert one.job(2).begun == Begun()


def test_engines_sample_episodes() -> None:
    """Through the scripted engine: two episodes, of three turns and of one, side by side in one call."""
    engine = ScriptedEngine(Characters(), answer=lambda prompt, index, seed: "ab>" if prompt.endswith(("Q: ", "+")) else "c>")
    long, short = episode(lambda: Replies("+", "-")), episode(SingleTurn)
    play([long, short], engine, Sampling(max_new_tokens=100, stop=(">",)))
    assert long.completion is not None and short.completion is not None
    assert "".join(map(chr, long.completion.token_ids)) == "ab>+ab>-c>"
    assert short.completion.text == "ab>" and not short.completion.sampled


def test_what_an_engine_sampled_in_later_turns_has_the_log_probs_of_the_whole_sequence(tiny_model: str) -> None:
    """Through transformers: eight rollouts of three turns; one forward pass over each whole sequence gives the same log-probs."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from grpo.rollouts.hf import HFEngine

    tokenizer, model = AutoTokenizer.from_pretrained(tiny_model), AutoModelForCausalLM.from_pretrained(tiny_model)
    dialogue, stop = PlainText(tokenizer), tuple("0123456789")  # a turn is about six random characters long
    episodes = [Episode(PROBLEM, i, 5, lambda: Replies("[1]", "(2)"), dialogue, 200) for i in range(8)]
    play(episodes, HFEngine(model, tokenizer=tokenizer), Sampling(max_new_tokens=200, stop=stop))
    turns = set()
    for completion in (one.completion for one in episodes):
        assert completion is not None and completion.num_turns == 3
        ids = torch.tensor([[*completion.prompt_ids, *completion.token_ids]])
        with torch.no_grad():
            logprobs = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        expected = logprobs[len(completion.prompt_ids) - 1 :][torch.tensor(completion.sampled)]
        torch.testing.assert_close(torch.tensor(completion.sampled_logprobs), expected, rtol=1e-4, atol=1e-4)
        between = [i for i, own in enumerate(completion.sampled) if not own]
        assert tokenizer.decode([completion.token_ids[i] for i in between]) == "[1](2)".replace("[", "<unk>").replace("]", "<unk>")
        turns |= {text for text, own in completion.transcript if own}
    assert len(turns) == 24, "no two turns drew the same randomness"


# ---------------------------------------------------------------- budgets


@pytest.mark.parametrize(
    ("budget", "text", "left"),
    [  # 2 of the turn, 3 of the answer "[x]": one token must be left to be sampled
        (6, "ab[x]", 1),
        (5, "ab", None),
        (4, "ab", None),
        (2, "ab", None),
    ],
)
def test_an_answer_that_leaves_no_room_is_left_out_and_the_rollout_is_cut_off(budget: int, text: str, left: int | None) -> None:
    one = episode(lambda: Replies("[x]"), max_new_tokens=budget)
    one.start()
    assert one.job(0).request.max_new_tokens == budget
    over = one.advance(turn_of(one.job(0), "ab"))
    if left is not None:
        job = one.job(1)
        assert not over and job.request.max_new_tokens == left
        assert "".join(map(chr, job.request.prompt_ids)) == "Q: " + text
        return
    assert over and one.completion is not None
    assert "".join(map(chr, one.completion.token_ids)) == text
    assert one.completion.finish_reason is FinishReason.length and not one.completion.transcript
    assert one.scores == {}


def test_a_truncated_turn_is_the_last_and_the_environment_is_not_asked() -> None:
    environment = Replies("x")
    one = episode(lambda: environment)
    one.start()
    assert one.advance(turn_of(one.job(0), "ab", reason=FinishReason.length))
    assert one.completion is not None and one.completion.truncated and environment.seen == []


@pytest.mark.parametrize("own", [None, 2])
def test_turns_are_bounded(own: int | None) -> None:
    class Endless(Replies):
        def step(self, completion: Completion) -> Sequence[Message] | Done:
            self.seen.append(completion.text)
            return (Message("text", "x"),)

    environment: Any = Endless()
    if own:
        environment.max_turns = own
    one = episode(lambda: environment, max_new_tokens=10**6)
    one.start()
    while not one.advance(turn_of(one.job(0), "a")):
        pass
    assert one.completion is not None and one.completion.truncated
    assert one.completion.num_turns == one.num_turns == len(environment.seen) == (own or MAX_TURNS)
    assert one.completion.sampled[-1]


def test_who_is_cut_off_may_say_what_it_was_worth() -> None:
    class Counts(Replies):
        def cut_off(self) -> Done:
            return Done({"progress": 0.25})

    one = episode(lambda: Counts("x"))
    one.start()
    one.advance(turn_of(one.job(0), "ab", reason=FinishReason.length))
    assert one.scores == {"progress": Score(value=0.25)}


# ---------------------------------------------------------------- failures


def raises(problem: Problem) -> Any:
    raise RuntimeError("the game server is gone")


def hangs(problem: Problem) -> Any:
    time.sleep(30)


def wrong(problem: Problem) -> Any:
    return "a text"


def leaves(problem: Problem) -> Any:
    raise SystemExit(1)


FAILURES = [
    (raises, Outcome.error, "RuntimeError: the game server is gone"),
    (hangs, Outcome.timeout, "did not answer in 0.05 s"),
    (wrong, Outcome.error, "returned 'a text'; it returns a list of one or more Message"),
    (leaves, Outcome.error, "SystemExit"),
]


class Breaks(Replies):
    timeout_s = 0.05

    def __init__(self, where: str, how: Callable[[Problem], Any]) -> None:
        super().__init__("x")
        self.where, self.how = where, how

    def start(self, problem: Problem) -> Sequence[Message]:
        return self.how(problem) if self.where == "start" else super().start(problem)

    def step(self, completion: Completion) -> Sequence[Message] | Done:
        return self.how(PROBLEM) if self.where == "step" else super().step(completion)

    def cut_off(self) -> Done:
        return self.how(PROBLEM) if self.where == "cut_off" else Done()


@pytest.mark.parametrize(("how", "outcome", "detail"), FAILURES)
@pytest.mark.parametrize("where", ["start", "step", "cut_off"])
def test_an_environment_that_fails_leaves_its_rollout_unscored(
    where: str, how: Callable[[Problem], Any], outcome: Outcome, detail: str
) -> None:
    if where == "cut_off" and how is wrong:
        detail = "returned 'a text'; at a limit it returns Done"
    one = episode(lambda: Breaks(where, how))
    one.start()
    if where != "start":
        assert one.completion is None
        reason = FinishReason.length if where == "cut_off" else FinishReason.stop
        assert one.advance(turn_of(one.job(0), "ab", reason=reason))
    failure = one.scores[FAILURE]
    assert not failure.scored and failure.outcome is outcome and detail in failure.detail
    assert "in_time" not in failure.detail, "the traceback begins with the author's own line"
    assert one.completion is not None and one.completion.text == ("" if where == "start" else "ab")
    rollout = one.rollout({"accuracy": Score(value=1.0)}, {"accuracy": 1.0})
    assert math.isnan(rollout.reward) and rollout.scores["accuracy"].value == 1.0


class Odd(Replies):
    """Asks and answers with what it is given, and has further attributes."""

    def __init__(self, opening: Any = "Q: ", reply: Any = "x", done: Any = None, **attributes: Any) -> None:
        super().__init__()
        self.opening, self.reply, self.done = opening, reply, done
        vars(self).update(attributes)

    def start(self, problem: Problem) -> Sequence[Message]:
        return (Message("text", self.opening),)

    def step(self, completion: Completion) -> Sequence[Message] | Done:
        return (Message("text", self.reply),) if self.done is None else Done(self.done)


class Limits(Odd):
    @property
    def max_turns(self) -> int:
        raise RuntimeError("nobody knows")


@pytest.mark.parametrize(
    ("make", "detail"),
    [
        (lambda: Odd(opening=5), "the content of a message of role 'text' is 5 (int); it must be a str"),
        (lambda: Odd(opening=""), "what the environment asks first is empty"),
        (lambda: Odd(reply=None), "the content of a message of role 'text' is None (NoneType); it must be a str"),
        (lambda: Odd(reply="1\ud83d"), "the content of a message of role 'text' holds half a character, '\\ud83d'"),
        (lambda: Odd(max_turns=None), "max_turns is None; it must be a whole number of at least 1"),
        (lambda: Odd(max_turns="3"), "max_turns is '3'; it must be"),
        (lambda: Limits(), "RuntimeError: nobody knows"),
        (lambda: Odd(timeout_s="x"), "timeout_s is 'x'; it must be a finite number above 0, or None"),
        (lambda: Odd(timeout_s=math.inf), "timeout_s is inf; it must be"),
        (lambda: Odd(timeout_s=0), "timeout_s is 0; it must be"),
        (lambda: Odd(done="won"), "Done has the scores 'won'; they are a number, or a mapping"),
        (lambda: Odd(done={3: 1.0}), "the name of a score is 3 (int); it must be a str"),
        (lambda: Odd(done={"a\ud800": 1.0}), "the name of a score holds half a character"),
        (lambda: Odd(done={"environment": 1.0}), "called a score 'environment', which is what its failures are called"),
    ],
)
def test_whatever_an_environment_says_wrong_is_its_failure(make: Callable[[], Environment], detail: str) -> None:
    one = episode(make)
    one.start()
    if one.completion is None:
        assert one.advance(turn_of(one.job(0), "ab"))
    assert detail in one.scores[FAILURE].detail
    assert math.isnan(one.rollout({"accuracy": Score(value=1.0)}, {"accuracy": 1.0}).reward)


def test_all_the_time_in_the_world_is_a_time() -> None:
    """More seconds than a thread can be waited for, which is 292 years."""
    one = episode(lambda: Odd(done={"won": 1.0}, timeout_s=1e12))
    one.start()
    assert one.advance(turn_of(one.job(0), "ab")) and one.scores == {"won": Score(value=1.0)}


def test_messages_that_have_no_form_are_the_environments_failure() -> None:
    class Picky(PlainText):
        def reply(self, messages: Sequence[Message], turn: Completion) -> tuple[int, ...]:
            raise ValueError("roles must alternate")

    one = episode(lambda: Replies("x"), dialogue=Picky(Characters()))
    one.start()
    assert one.advance(turn_of(one.job(0), "ab"))
    assert "ValueError: roles must alternate" in one.scores[FAILURE].detail


def test_a_first_prompt_that_the_engine_has_no_room_for_is_the_environments_failure() -> None:
    """PROBLEM's prompt fits exactly, and the same with a character more does not."""
    for room, fits in (len(PROBLEM.prompt), True), (len(PROBLEM.prompt) - 1, False):
        one = Episode(PROBLEM, 0, 0, lambda: Replies("x"), PlainText(Characters()), 10, room)
        one.start()
        assert (one.completion is None) is fits
    expected = f"first is {len(PROBLEM.prompt)} tokens long, and beside rollout.max_new_tokens=10 the engine has room for {room}: "
    assert expected in one.scores[FAILURE].detail


def test_a_failure_needs_no_prompt() -> None:
    one = Episode(replace(PROBLEM, prompt=""), 0, 0, lambda: Breaks("start", raises), PlainText(Characters()), 10)
    one.start()
    assert one.completion is not None and "the game server is gone" in one.scores[FAILURE].detail


def test_an_environment_that_cannot_be_made_fails_alike() -> None:
    def broken() -> Environment:
        raise OSError("no licence for the simulator")

    one = episode(broken)
    one.start()
    assert one.completion is not None and "no licence" in one.scores[FAILURE].detail


class TextRaises(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


def test_an_error_without_a_text_is_a_failure_like_others() -> None:
    def raises_it(problem: Problem) -> Any:
        raise TextRaises

    one = episode(lambda: Breaks("start", raises_it))
    one.start()
    assert one.completion is not None and "TextRaises" in one.scores[FAILURE].detail and "raises_it" in one.scores[FAILURE].detail


def test_a_machine_without_a_thread_left_is_a_failure_like_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    one = episode(lambda: Replies("x"))
    one.start()
    assert one.completion is not None and "there is no thread to call the environment from: can't start" in one.scores[FAILURE].detail


def test_one_that_is_made_too_late_is_closed() -> None:
    time_is_over, closed = threading.Event(), threading.Event()

    class Late(Replies):
        timeout_s = 0.05

        def __init__(self) -> None:
            time_is_over.wait(20)

        def close(self) -> None:
            closed.set()

    one = episode(Late)
    one.start()
    assert one.completion is not None and "did not answer in 0.05 s" in one.scores[FAILURE].detail and not closed.is_set()
    time_is_over.set()
    assert closed.wait(20)


def test_a_hanging_environment_does_not_keep_the_process() -> None:
    one = episode(lambda: Breaks("start", hangs))
    before = set(threading.enumerate())
    one.start()
    assert all(thread.daemon for thread in set(threading.enumerate()) - before)


def test_a_role_that_the_dialogue_has_no_form_for_is_the_recipes_mistake() -> None:
    class Chats(Replies):
        def start(self, problem: Problem) -> Sequence[Message]:
            return (Message("user", problem.prompt),)

    with pytest.raises(ValueError, match=r"role 'user', which plain text has no form for\n  → data\.chat=true"):
        episode(Chats).start()


class Templated(Replies):
    def __init__(self, opening: Callable[[Problem], str], role: str = "user") -> None:
        super().__init__()
        self.opening, self.role = opening, role

    def start(self, problem: Problem) -> Sequence[Message]:
        return (Message(self.role, self.opening(problem)),)


class Roles(PlainText):
    """<role>content"""

    def _shown(self, message: Message) -> str:
        return message.content if message.role == "text" else f"<{message.role}>{message.content}"


def test_a_prompt_in_the_chat_template_is_not_put_into_it_again() -> None:
    problem = Problem(id="p", prompt="<user>1 + 1 =<assistant>", question="1 + 1 =", answer="2")

    def opening(environment: Callable[[], Environment], problem: Problem = problem) -> str:
        one = Episode(problem, 0, 0, environment, Roles(Characters()), 10)
        one.start()
        return "".join(map(chr, one.prompt_ids))

    with pytest.raises(ConfigError, match=r"puts problem\.prompt into a message of role 'user'[^→]*→ Message\('user', problem\.question\)"):
        opening(lambda: Templated(lambda problem: f"Be brief. {problem.prompt}"))
    assert opening(lambda: Templated(lambda problem: f"Be brief. {problem.question}")) == "<user>Be brief. 1 + 1 ="
    assert opening(lambda: Templated(lambda problem: problem.prompt, role="text")) == problem.prompt
    assert opening(lambda: Templated(lambda problem: problem.prompt), problem=PROBLEM) == "<user>Q: ", "there is no template in this one"


# ---------------------------------------------------------------- the end


class Closes(Breaks):
    def __init__(self, where: str = "", how: Callable[[Problem], Any] = raises) -> None:
        super().__init__(where, how)
        self.closed = 0

    def close(self) -> None:
        self.closed += 1
        if self.where == "close":
            self.how(PROBLEM)


@pytest.mark.parametrize("how", [raises, hangs])
@pytest.mark.parametrize("where", ["", "start", "step", "cut_off", "close"])
def test_an_environment_is_closed_once_however_its_rollout_ends(where: str, how: Callable[[Problem], Any]) -> None:
    environment = Closes(where, how)
    one = episode(lambda: environment)
    one.start()
    while one.completion is None:
        assert environment.closed == 0
        reason = FinishReason.length if where == "cut_off" else FinishReason.stop
        one.advance(turn_of(one.job(0), "ab", reason=reason))
    assert environment.closed == 1
    assert (FAILURE in one.scores) == bool(where)
    rollout = one.rollout({}, {"turns": 1.0})
    assert rollout.scored == (not where)
    if where == "close":
        assert one.scores["turns"].value == 2, "what it said before is kept"


def test_one_whose_time_is_nonsense_is_closed() -> None:
    environment = Closes()
    vars(environment)["timeout_s"] = "soon"
    one = episode(lambda: environment)
    one.start()
    assert one.completion is not None and environment.closed == 1


def test_half_a_character_in_a_tag_can_be_stored() -> None:
    one = episode(lambda: Odd(done={"won": Score(value=1.0, detail="half \ud83d", tags=("half \ud83d",))}))
    one.start()
    assert one.advance(turn_of(one.job(0), "ab"))
    group = Group(problem=PROBLEM, rollouts=(one.rollout({}, {"won": 1.0}),))
    (stored,) = groups_of(rollout_table(1, [group], {}, {}))
    won = stored.rollouts[0].scores["won"]
    assert (won.detail, won.tags) == (r"half \ud83d", (r"half \ud83d",))


# ---------------------------------------------------------------- scores


def test_a_score_of_the_environment_does_not_replace_a_reward_part() -> None:
    """The part says 0; an environment that calls a score of its own the same has made a mistake, and no reward of 1."""
    one = episode(lambda: Odd(done={"accuracy": 1.0, "won": 0.5}))
    one.start()
    one.advance(turn_of(one.job(0), "ab"))
    rollout = one.rollout({"accuracy": Score(value=0.0)}, {"accuracy": 1.0})
    assert math.isnan(rollout.reward) and (rollout.scores["accuracy"].value, rollout.scores["won"].value) == (0.0, 0.5)
    assert "gave a score of the name accuracy, which a reward part has already" in rollout.scores[FAILURE].detail


@pytest.mark.parametrize("score", [0.5, Score(value=0.5)])
def test_a_score_without_a_name_is_called_score(score: Score | float) -> None:
    one = episode(lambda: Odd(done=score))
    one.start()
    assert one.advance(turn_of(one.job(0), "ab")) and one.scores == {"score": Score(value=0.5)}
    assert one.rollout({"accuracy": Score(value=1.0)}, {"accuracy": 1.0, "score": 4.0}).reward == 3.0  # 1 + 4 · 0.5


def test_a_failed_environment_is_what_its_missing_score_names() -> None:
    one = episode(lambda: Breaks("step", raises))
    one.start()
    assert one.advance(turn_of(one.job(0), "ab"))
    rollout = one.rollout({}, {"won": 1.0})
    assert math.isnan(rollout.reward) and rollout.scores["won"].detail == "the environment failed"


def test_the_environments_scores_are_weighed_beside_the_reward_parts() -> None:
    """0.5 · 1 + 2 · 3 turns; the score that has no weight is only kept."""
    one = episode(lambda: Replies("x", "y"))
    one.start()
    while not one.advance(turn_of(one.job(0), "a")):
        pass
    rollout = one.rollout({"accuracy": Score(value=1.0)}, {"accuracy": 0.5, "turns": 2.0})
    assert rollout.reward == 6.5
    assert one.rollout({"accuracy": Score(value=1.0)}, {"accuracy": 0.5}).reward == 0.5


def test_a_score_that_a_cut_off_rollout_never_got_is_zero_and_one_of_a_failure_is_unknown() -> None:
    one = episode(lambda: Replies("x"))
    one.start()
    one.advance(turn_of(one.job(0), "a", reason=FinishReason.length))
    rollout = one.rollout({"accuracy": Score(value=1.0)}, {"accuracy": 0.5, "turns": 2.0})
    assert rollout.reward == 0.5 and rollout.scores["turns"].value == 0
    one = episode(lambda: Breaks("step", raises))
    one.start()
    one.advance(turn_of(one.job(0), "a"))
    rollout = one.rollout({}, {"turns": 2.0})
    assert math.isnan(rollout.reward) and not rollout.scores["turns"].scored


def test_the_ten_lines_of_the_docs_work(repository: Path) -> None:
    text = (repository / "docs" / "extending.md").read_text()
    source = text.split("## Environments")[1].split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(source, names)
    for said, turns, won in (["7"], 1, 1.0), (["3", "7"], 2, 1.0), (["3", "x", "9"], 3, 0.0):
        one = episode(lambda: names["Guess"](tries=3))
        one.start()
        for text in said:
            over = one.advance(turn_of(one.job(0), text))
        assert over and one.num_turns == turns and one.scores["won"].value == won


def test_lengths_are_checked() -> None:
    one = episode(SingleTurn)
    one.start()
    turn = turn_of(one.job(0), "ab")
    with pytest.raises(ValueError, match="sampled has length 1 and token_ids 2"):
        replace(turn, sampled=(True,))
