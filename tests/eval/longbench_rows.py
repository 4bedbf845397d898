"""Made-up LongBench records with the right fields; shared by the test_longbench files through runpy."""

from __future__ import annotations

import json
from pathlib import Path

from dense2sparse.eval.longbench_tasks import TASKS, V2, base

ROW = {
    "input": "Which colour?",
    "context": "The door is green. " * 60,
    "answers": ["green", "dark green"],
    "length": 240,
    "dataset": "qasper",
    "language": "en",
    "all_classes": None,
    "_id": "r0",
}
ROW_V2 = {
    "_id": "q0",
    "domain": "Long books",
    "sub_domain": "Doors",
    "difficulty": "hard",
    "length": "short",
    "question": " Which colour? ",
    "choice_A": "red",
    "choice_B": "green",
    "choice_C": "blue",
    "choice_D": "none ",
    "answer": "B",
    "context": "The door is green.\n",
}


def row_of(task: str, **changes: object) -> dict:
    """A made-up record with the right fields for a task."""
    row = dict(ROW_V2 if task == V2 else ROW)
    if task != V2:
        row["dataset"] = base(task)
        if TASKS[base(task)].metric == "classification":
            row["all_classes"] = ["green", "red"]
    return {**row, **changes}


def folder_of(path: Path, **files: list) -> Path:
    """A data folder with these files (name -> rows)."""
    path.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return path
