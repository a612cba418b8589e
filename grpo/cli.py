"""The ``grpo`` command: words in, one clear message out. Hydra's grammar of overrides, ``--multirun`` and ``--cfg`` are its own."""

from __future__ import annotations

import argparse
import json
import os
import select
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo.config import Config, ConfigError, keys
from grpo.environment import prepare_process
from grpo.interrupt import Interrupted
from grpo.storage import StorageError

if TYPE_CHECKING:
    from grpo.run import RunFolder

EPILOG = """\
examples:
  grpo train r1_zero_arithmetic optim.lr=1e-5 rollout=hf
  grpo train ./my_recipe.yaml run.name=first
  grpo train r1_zero_arithmetic --multirun run.seed=0,1,2
  grpo train r1_zero_arithmetic --cfg job
  grpo train r1_zero_arithmetic algo=dapo --dry-run   the formula it would train, in words and numbers
  grpo train runs/r1_zero_arithmetic/first            go on from its last checkpoint
  grpo eval runs/r1_zero_arithmetic/first
  grpo score --reward math completions.jsonl --out scored.jsonl
  grpo show runs/r1_zero_arithmetic/first --worst
  grpo replay runs/r1_zero_arithmetic/first --reward ./my_rewards.py:brevity
  grpo recipes show r1_zero_arithmetic
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Exit status: 0 done, 1 a setting or the machine is wrong, 130 interrupted, 141 the reader of a pipe is gone.

    In the last two cases what is done is saved.
    """
    prepare_process()
    warnings.formatwarning = _format_warning
    options, behind = (top := parser()).parse_known_args(argv)
    if behind and (not hasattr(options, "overrides") or any(word.startswith("-") for word in behind)):
        top.error(f"unrecognized arguments: {' '.join(behind)}")
    if behind:  # argparse takes no words behind an option: --multirun run.seed=0,1
        options.overrides += behind
    try:
        command: Callable[[argparse.Namespace], int] = options.command
        status = command(options)
        sys.stdout.flush()  # here, where a reader that has gone is known
        return status
    except (ConfigError, StorageError) as error:  # they say what to do
        print(f"grpo: {error}", file=sys.stderr)
        return 1
    except (Interrupted, KeyboardInterrupt):
        print("grpo: stopped; `grpo train <run folder>` goes on from the last checkpoint, if there is one", file=sys.stderr)
        return 130
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():  # the reader, `head` for one, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if options.command is _train:
                print("grpo: stopped, for nobody reads the output any more; `grpo train <run folder>` goes on", file=sys.stderr)
            return 141
        if os.environ.get("GRPO_TRACEBACK"):
            raise
        print(f"grpo: {error}\n  (GRPO_TRACEBACK=1 shows where)", file=sys.stderr)
        return 1


def _nobody_reads() -> bool:
    """Whether standard output is a pipe whose reader has gone. Elsewhere a broken pipe is another's: a worker's, a sandbox's."""
    poll = select.poll()
    try:
        poll.register(sys.stdout, 0)  # the two below are told of in any case
    except (OSError, ValueError):  # no file of the system's, as in a notebook
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="grpo", description=(__doc__ or "").splitlines()[0], epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(title="commands", required=True, metavar="{train,eval,score,show,replay,recipes}")

    train = commands.add_parser("train", help="run a recipe, or go on with a run folder")
    train.add_argument("recipe", help="a built-in recipe, a YAML file, or a run folder")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="any key of the recipe; `grpo recipes show` lists them")
    train.add_argument("--multirun", "-m", action="store_true", help="a sweep: key=a,b,c runs each (Hydra)")
    train.add_argument("--cfg", choices=["job"], help="print the composed configuration and stop")
    train.add_argument("--dry-run", action="store_true", help="check all that needs no model, print the objective card and stop")
    train.set_defaults(command=_train)

    evaluate = commands.add_parser("eval", help="score a run or a model folder on held-out problems")
    evaluate.add_argument("target", help="a run folder (its last checkpoint), or any model folder")
    evaluate.add_argument("overrides", nargs="*", metavar="key=value")
    evaluate.add_argument("--recipe", help="whose problems; default: the run's own, else r1_zero_arithmetic")
    evaluate.add_argument("--samples", type=int, help="completions a problem; default: eval.samples")
    evaluate.add_argument("--out", type=Path, help="write every completion with its scores to this JSON-lines file")
    evaluate.set_defaults(command=_eval)

    score = commands.add_parser("score", help="score a file of completions with a reward, or compare two rewards on it")
    score.add_argument("file", type=Path, help="JSON lines, one object a completion")
    score.add_argument("--reward", required=True, help="math, format, …; an import path or file.py:function; `key=value` behind it")
    score.add_argument("--out", type=Path, help="write the rows with score, outcome, extracted and seconds to this file")
    score.add_argument("--completion-key", default="completion", help="the key of the completion's text")
    score.add_argument("--gold-key", help="the key of the gold answer; default: gold; '' if the reward needs none")
    score.add_argument("--prompt-key", default="prompt", help="the key of the prompt, which may be missing")
    score.add_argument("--gold", action="store_true", help="score the gold answers themselves: each must give 1")
    score.add_argument("--gold-template", help=r"how a model would write the gold answer {}; default for math: '\boxed{{}}'")
    score.add_argument("--compare", metavar="OTHER", help="another reward, or MODULE:FUNCTION called as f(gold, completion)")
    score.add_argument("--workers", type=int, default=0, help="processes that score; 0: one a core")
    score.add_argument("--prefix", default="", help="put before the names of the added columns")
    score.set_defaults(command=_score)

    show = commands.add_parser("show", help="print rollouts of a run with their scores, advantages and texts")
    show.add_argument("run", help="a run folder")
    show.add_argument("--step", type=int, help="default: the last one")
    show.add_argument("--eval", action="store_true", help="those of the evaluations instead of training")
    order = show.add_mutually_exclusive_group()
    order.add_argument("--best", action="store_true", help="the highest rewards first")
    order.add_argument("--worst", action="store_true", help="the lowest rewards first")
    show.add_argument("--problem", metavar="ID", default="", help="only the group of this problem")
    show.add_argument("--outcome", default="", help="only where some reward part had this outcome, e.g. timeout")
    show.add_argument("--limit", type=int, default=5, help="how many to print (default 5)")
    show.add_argument("--whole", action="store_true", help="whole prompts, not only their ends")
    show.set_defaults(command=_show)

    replay = commands.add_parser("replay", help="score a run's stored rollouts again with a changed reward, or make an update again")
    replay.add_argument("run", help="a run folder")
    replay.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. reward.format.weight=0.5; nothing is written to the run")
    replay.add_argument("--reward", help="a name: r1_rules, math, format, …; an import path or file.py:function; default: the run's own")
    replay.add_argument("--step", type=int, help="one step; default: all (with --train: 1)")
    replay.add_argument("--train", action="store_true", help="make the update of the step again, by its reward or a changed one")
    replay.add_argument("--limit", type=int, default=5, help="changed judgements to print (default 5)")
    replay.set_defaults(command=_replay)

    recipes = commands.add_parser("recipes", help="list the built-in recipes, or show every key of one with its meaning")
    recipes.add_argument("action", nargs="?", choices=["list", "show"], default="list")
    recipes.add_argument("recipe", nargs="?", default="r1_zero_arithmetic")
    recipes.set_defaults(command=_recipes)
    return top


def _train(options: argparse.Namespace) -> int:
    from grpo.recipe import compose_recipe, load_recipe, load_run, refuse_resume, to_yaml

    is_run = _names_a_run(options.recipe)
    if options.multirun and (options.cfg or options.dry_run or is_run):
        raise ConfigError("--multirun", "goes with a recipe alone", "leave out --cfg and --dry-run; a run folder is one run")
    if is_run:
        config = load_run(_open(options.recipe).path, options.overrides)
        if not config.run.recipe:
            raise ConfigError("run", f"{options.recipe!r} stands in no folder of a recipe", "move it to <dir>/<recipe>/<name>")
        config.run.resume = True
    elif options.cfg:
        print(to_yaml(compose_recipe(options.recipe, options.overrides)), end="")
        return 0
    elif options.multirun:
        from grpo.sweep import sweep

        sweep(options.recipe, options.overrides, _run)
        return 0
    else:
        config = load_recipe(options.recipe, *options.overrides)
        refuse_resume(config)
    if options.cfg:
        from grpo.build import plain
        from grpo.config_file import dump

        print(dump(plain(config)), end="")
        return 0
    if options.dry_run:
        from grpo.build import dry_run

        print(dry_run(config), end="")
        return 0
    _run(config)
    return 0


def _names_a_run(target: str) -> bool:
    """Whether ``grpo train`` is given a run folder, or what can only be meant for one."""
    from grpo.recipe import built_in

    folder = Path(target).expanduser()
    if (folder / "config.yaml").is_file():
        return True
    if target in built_in() or target.endswith((".yaml", ".yml")) or Path(f"{folder}.yaml").is_file():
        return False
    return "/" in target or (bool(target) and folder.is_dir())


def _open(target: str) -> RunFolder:
    """The run folder that is named on the command line.

    Raises:
        ConfigError: there is none. For what is inside of one, a checkpoint or a file for instance, it names that.
    """
    from grpo.run import RunFolder

    folder = Path(target).expanduser()
    if folder.exists() and not (folder / "config.yaml").is_file() and (run := _run_around(folder)):
        raise ConfigError("run", f"{target!r} is a part of a run, not the run folder", f"give {str(run)!r}")
    return RunFolder.open(folder)


def _run_around(folder: Path) -> Path | None:
    """``folder`` as it was written if it is a run folder; else the nearest one it stands in."""
    marks = ("metrics.jsonl", "environment.json")  # beside the configuration; the former from the first row on
    for place in (folder, *folder.resolve().parents):
        if (place / "config.yaml").is_file() and any((place / mark).is_file() for mark in marks):
            return place
    return None


def _run(config: Config) -> None:
    _check_machine(config)
    from grpo.build import train

    result = train(config)
    if not config.logger.console:
        print(f"{result.headline}; {result.run.path}")


def _eval(options: argparse.Namespace) -> int:
    from grpo.recipe import load_recipe, load_run
    from grpo.run import RunFolder

    folder = target = Path(options.target).expanduser()
    run_folder = _run_around(target)
    if run_folder is not None and run_folder == target:
        from grpo import checkpoint

        run = RunFolder.open(target)
        step = checkpoint.last_sound_step(run)
        if not step:
            raise ConfigError("eval", f"{target} has no checkpoint yet", "let the run reach run.checkpoint_every steps")
        folder = run.checkpoint(step)
    elif not (target / "config.json").is_file():
        raise ConfigError(
            "eval", f"{options.target!r} is neither a run folder nor a model folder (no config.yaml, no config.json)", "check the path"
        )
    else:
        _check_sound(target)
    if run_folder is not None and options.recipe is None:
        config = load_run(run_folder, options.overrides)
    else:
        config = load_recipe(options.recipe or "r1_zero_arithmetic", *options.overrides)
    config.model.path, config.model.revision = str(folder), None
    if not config.eval.problems:
        raise ConfigError("eval.problems", "is 0, so there is nothing to score", "set it to 1 or more")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.touch()  # a path that cannot be written is known now, not after the evaluation
    if options.samples is not None:
        if options.samples < 1:
            raise ConfigError("--samples", f"is {options.samples}", "give 1 or more")
        config.eval.samples = options.samples
    _check_machine(config)
    from grpo.build import evaluate

    metrics, groups = evaluate(config, str(folder))
    if options.out:
        with options.out.open("w", encoding="utf-8") as lines:
            for rollout in (r for g in groups for r in g.rollouts):
                scores = {name: score.value for name, score in rollout.scores.items()}
                row = {
                    "id": rollout.problem.id,
                    "prompt": rollout.problem.prompt,
                    "answer": rollout.problem.answer,
                    "completion": rollout.completion.text,
                }
                lines.write(
                    json.dumps(row | {"finish_reason": str(rollout.completion.finish_reason), "scores": scores}, ensure_ascii=False) + "\n"
                )
    print(
        f"{folder}\nheld-out pass@1 {metrics['eval/pass@1']:.3f} ± {metrics['eval/pass@1_ci95']:.3f} "
        f"({len(groups)} problems × {config.eval.samples}, temperature {config.eval.temperature:g}, top-p {config.eval.top_p:g})"
    )
    for name, value in sorted(metrics.items()):
        if name not in ("eval/pass@1", "eval/pass@1_ci95"):
            print(f"  {name.removeprefix('eval/'):<24} {value:.4g}")
    return 0


def _check_sound(model: Path) -> None:
    """
    Raises:
        ConfigError: the folder is a checkpoint of a run, and its model not what was written.
    """
    from grpo import checkpoint

    if (model / checkpoint.CHECKSUM_FILE).is_file() and (damage := checkpoint.damaged_model(model)):
        raise ConfigError("eval", f"{str(model)!r} is damaged: {damage}", "choose another checkpoint, or put the file back as it was")


def _score(options: argparse.Namespace) -> int:
    from grpo.score import Task, run

    settings = {name: value for name, value in vars(options).items() if name != "command"}
    return run(Task(**settings))


def _show(options: argparse.Namespace) -> int:
    from grpo.console import Terminal
    from grpo.show import Choice, show

    choice = Choice(
        step=options.step,
        folder="eval" if options.eval else "rollouts",
        worst=options.worst,
        best=options.best,
        problem=options.problem,
        outcome=options.outcome,
        limit=options.limit,
        whole=options.whole,
    )
    show(_open(options.run), choice, Terminal())
    return 0


def _replay(options: argparse.Namespace) -> int:
    from grpo.recipe import load_run
    from grpo.show import steps_of

    if options.limit < 0:
        raise ConfigError("--limit", f"is {options.limit}", "give how many changed judgements to print; 0: none")
    run = _open(options.run)
    steps = steps_of(run, options.step)
    config = load_run(run.path, options.overrides, options.reward)
    from grpo import build, replay

    if options.train:
        new_reward = config.reward != load_run(run.path).reward
        stored, fresh = build.retrain(config, run, 1 if options.step is None else options.step, new_reward=new_reward)
        print(replay.compare_updates(stored, fresh))
        return 0
    print(replay.report(build.rescore(config, run, steps), options.limit))
    return 0


def _recipes(options: argparse.Namespace) -> int:
    from grpo.recipe import built_in, compose_recipe, groups

    if options.action == "list":
        for name, line in built_in().items():
            print(f"{name:<22} {line}")
        print("\nconfig groups (choose with group=choice):")
        for name, choices in sorted(groups().items()):
            print(f"  {name:<10} {', '.join(choices)}")
        return 0
    from omegaconf import OmegaConf

    composed = compose_recipe(options.recipe, [])
    for key, (_, meaning) in keys().items():
        value: Any = OmegaConf.to_container(OmegaConf.masked_copy(composed, key.split(".")[0]), resolve=False)
        for word in key.split("."):
            value = value[word]
        shown = " ".join(str(value).split())
        print(f"{key} = {shown if len(shown) <= 100 else shown[:97] + '…'}\n    {meaning}")
    return 0


def _format_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
    """Ours are for the person at the terminal; those of libraries say where they come from."""
    return f"grpo: warning: {message}\n" if category is UserWarning else f"{filename}:{lineno}: {category.__name__}: {message}\n"


def _check_machine(config: Config) -> None:
    """Stop for what cannot work here, say what is only worth knowing."""
    from grpo.environment import check_environment

    for problem in check_environment(str(config.rollout.engine)):
        if not problem.startswith("note:"):
            raise ConfigError("environment", problem)
        print(f"grpo: {problem}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
