"""Stands in for the training module under the real launcher; `wandb.group` of the recipe says how to act.

finish           writes the finished mark
no_mark          ends well, but without the mark
mark_then_crash  writes the mark, then ends with code 3
wait             works until it is asked to stop, takes a second to save, ends with code 75
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from dense2sparse.recipes.load import fingerprint, load

SAVE_S = 1.0
SHOWN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR", "OMP_NUM_THREADS")


def main() -> int:
    recipe = load(sys.argv[1], sys.argv[2:])
    folder = Path(recipe.output_dir) / recipe.name
    rank = os.environ["RANK"]
    mode = recipe.wandb.group
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    shown = {k: v for k, v in os.environ.items() if k in SHOWN or k.startswith(("WANDB_", "HF_"))}
    record = {"pid": os.getpid(), "arguments": sys.argv[1:], "environ": shown}
    (folder / f"part-{rank}").write_text(json.dumps(record))
    (folder / f"part-{rank}").rename(folder / f"started-{rank}.json")
    if mode in ("finish", "mark_then_crash") and rank == "0":
        mark = {"fingerprint": fingerprint(recipe), "stages": []}
        (folder / "finished.json").write_text(json.dumps(mark))
    if mode == "wait":
        while not asked and not (folder / "STOP").exists():
            time.sleep(0.05)
        time.sleep(SAVE_S)
        (folder / f"saved-{rank}").touch()
        return 75
    return 3 if mode == "mark_then_crash" else 0


if __name__ == "__main__":
    sys.exit(main())
