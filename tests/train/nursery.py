"""Starts runs quickly: imports everything once, then forks a child for every line it reads.

Each line on stdin is JSON: {"args": [...], "env": {...}, "output": file} starts `train.run.main(args)` in a
new process and answers with its pid; {"wait": pid} answers with its exit code (negative: the signal). The
child is the real run in every other way: own process group, own signals, own exit.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import traceback

import deepspeed  # noqa: F401
import transformers  # noqa: F401

from dense2sparse.train import run, stages, start  # noqa: F401


def child(order: dict) -> None:
    """Become the run."""
    os.setpgid(0, 0)
    output = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(order["env"])
    if order.get("file_limit_bytes"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_limit_bytes"],) * 2)
    try:
        run.main(order["args"])
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(99)  # main always leaves by itself


def main() -> None:
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            _, status = os.waitpid(order["wait"], 0)
            answer = os.waitstatus_to_exitcode(status)
        else:
            answer = os.fork()
            if answer == 0:
                child(order)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
