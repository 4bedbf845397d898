"""The `dense2sparse` command: checks the recipe without torch, then hands over.

    dense2sparse run RECIPE [a.b=c ...]           through the DeepSpeed launcher, on this machine's devices
    dense2sparse run --hostfile HOSTS RECIPE ...  on several (launch/multinode.sh, launch/slurm.sh)
    dense2sparse stop RECIPE [a.b=c ...]          asks that run to save and end at its next step
    dense2sparse plan RECIPE [a.b=c ...]          the resolved recipe and its stages
    dense2sparse eval RECIPE [a.b=c ...]          the evaluation stages alone, on any converted checkpoint
    dense2sparse preflight RECIPE ...             and: export | report | score | lm-eval FOLDER

Exit codes: 0 done; 1 failed; 2 the recipe or the command cannot be used (one sentence on stderr);
75 asked to stop: saved, and the same command continues (a scheduler should requeue it).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence

from ..recipes.load import RecipeError, load
from ..recipes.schema import Recipe
from .launcher import Cluster, LaunchError, check_one_node, child_environment, own_gpus
from .plan import plan_text
from .run import EXIT_BAD_RECIPE, evaluate, option_words, run, run_folder, stop

TRAIN_MODULE = "dense2sparse.train.run"
EVAL_MODULE = "dense2sparse.eval.run"
HANDED_OVER = {
    "preflight": ("dense2sparse.train.preflight", "what a run will cost and whether it can work"),
    "export": ("dense2sparse.model.export", "a finished run as a folder for other software"),
    "report": ("dense2sparse.eval.report", "the report of a run's folder, made again"),
    "score": (
        "dense2sparse.eval.score",
        "scores of prediction files, also of those made elsewhere",
    ),
    "lm-eval": ("dense2sparse.eval.lm_eval_command", "MMLU, GSM8K, ARC and others through lm-eval"),
}
TAKE_A_RECIPE = ("preflight",)
VALUE_OPTIONS = ("--ranks",)
"""Options of `TAKE_A_RECIPE` whose next word is their value; a test compares them with the modules'."""


def main(argv: Sequence[str] | None = None, *, module: str = TRAIN_MODULE) -> int:
    """Run one command.

    Args:
        argv: arguments after the program's name; default those of the process.
        module: what the launcher starts on every rank.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in HANDED_OVER:
        return _hand_over(arguments[0], arguments[1:])
    options = _parse(arguments)
    try:
        recipe = load(options.recipe, options.overrides)
        if options.command == "plan":
            print(plan_text(recipe, str(run_folder(recipe))))
            return 0
        if options.command == "stop":
            print(f"dense2sparse: {stop(recipe)}")
            return 0
        cluster = Cluster(
            ranks=options.ranks,
            hostfile=options.hostfile,
            no_ssh=options.no_ssh,
            node_rank=options.node_rank,
            master_addr=options.master_addr,
            master_port=options.master_port,
        )
        if options.command == "eval":
            return _evaluate(recipe, options, cluster)
        return run(recipe, options.recipe, options.overrides, cluster, module=module)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `plan ... | head`
        return 0
    except (RecipeError, LaunchError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_RECIPE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dense2sparse",
        description="Convert a dense language model to MiniMax Sparse Attention, and measure the cost.",
        epilog="exit codes: 0 done, 1 failed, 2 bad recipe or command, 75 stopped and resumable",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    runs = commands.add_parser("run", help="start or continue a run on this machine or a cluster")
    stops = commands.add_parser("stop", help="ask a run, also on other machines, to save and end")
    plan = commands.add_parser("plan", help="print the resolved recipe and its stages")
    evals = commands.add_parser(
        "eval", help="the evaluation stages alone, on any converted checkpoint"
    )
    for name, (_, text) in HANDED_OVER.items():
        commands.add_parser(name, help=text)
    for command in (runs, stops, plan, evals):
        command.add_argument("recipe", help="YAML file, for example recipes/quickstart.yaml")
        command.add_argument(
            "overrides", nargs="*", metavar="a.b=c", help="values that replace the recipe's"
        )
    evals.add_argument("--checkpoint", help="converted folder; default the run's newest")
    evals.add_argument("--output", help="where results go; default the run's folder")
    for command in (runs, evals):
        _add_cluster(command)
    return parser


def _add_cluster(command: argparse.ArgumentParser) -> None:
    """Options that say which ranks are started."""
    command.add_argument(
        "--ranks", type=_positive, help="processes (default: every GPU, or 1 on CPU)"
    )
    command.add_argument(
        "--hostfile", help="nodes, one `name slots=N` a line; default: this machine"
    )
    command.add_argument("--no_ssh", action="store_true", help="start this node's ranks only")
    command.add_argument(
        "--node_rank", type=int, help="with --no_ssh: this node's line in the hostfile"
    )
    command.add_argument("--master_addr", help="address of the first node")
    command.add_argument("--master_port", type=_port, help="default 29500; one node: a free port")


def _evaluate(recipe: Recipe, options: argparse.Namespace, cluster: Cluster) -> int:
    """Become the evaluation where one process does it, which needs no launcher; else start its ranks."""
    given = {name: getattr(options, name) for name in ("checkpoint", "output")}
    given = {name: value for name, value in given.items() if value is not None}
    if options.hostfile is None:
        check_one_node(cluster)
        gpus = own_gpus()
        if (options.ranks or len(gpus) or 1) == 1:
            words = [EVAL_MODULE, options.recipe, *options.overrides, *option_words(given)]
            return _become(words, child_environment(os.environ, gpus))
    return evaluate(
        recipe,
        options.recipe,
        options.overrides,
        cluster,
        options=given,
        module=EVAL_MODULE,
    )


def _parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line; overrides may stand before and after options."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    unknown = [argument for argument in rest if argument.startswith("-")]
    if unknown:
        parser.error(f"unknown option {unknown[0]}; `dense2sparse {options.command} -h` lists them")
    options.overrides += rest
    return options


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 1 to 65535")
    return int(text)


def _words(arguments: list[str]) -> list[str]:
    """What is neither an option nor its value: the recipe and its overrides, in this order."""
    words, is_value = [], False
    for argument in arguments:
        if argument.startswith("-"):
            # argparse takes the beginning of an option for the option.
            is_value = len(argument) > 2 and any(o.startswith(argument) for o in VALUE_OPTIONS)
            continue
        if not is_value:
            words.append(argument)
        is_value = False
    return words


def _hand_over(command: str, arguments: list[str]) -> int:
    """Become `python -m module`, after the recipe is known to be good; returns on a mistake only."""
    module, _ = HANDED_OVER[command]
    words = _words(arguments)
    wants_help = "-h" in arguments or "--help" in arguments
    try:
        if command in TAKE_A_RECIPE and words and not wants_help:
            load(words[0], words[1:])
        if importlib.util.find_spec(module) is None:
            raise LaunchError(
                f"{command}: the module {module} is not installed; reinstall the package"
            )
        environ = child_environment(os.environ, own_gpus())
    except (RecipeError, LaunchError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_RECIPE
    if not arguments:
        helps = [sys.executable, "-m", module, "--help"]
        subprocess.run(helps, env=environ, stdout=2, check=False)
        wanted = "a recipe" if command in TAKE_A_RECIPE else "a run's folder"
        print(f"error: `dense2sparse {command}` needs {wanted}", file=sys.stderr)
        return EXIT_BAD_RECIPE
    return _become([module, *arguments], environ)


def _become(words: list[str], environ: dict[str, str]) -> int:
    """Replace this process by `python -m words`."""
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", *words], environ)
    return 0


if __name__ == "__main__":
    sys.exit(main())
