"""Started by test_wandb_run.py with a folder: an online wandb run whose server is gone after its start.

The server answers only what wandb asks to start a run. Prints JSON: seconds that recording a point and
ending the run took after that.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

from dense2sparse.eval import wandb_run

PROJECT = {"id": "1", "name": "tests", "entity": {"id": "1", "name": "nobody"}}
BUCKET = {"id": "1", "name": "online12", "displayName": "t", "project": PROJECT}
ANSWERS = {
    "viewer": {"id": "1", "username": "nobody", "entity": "nobody", "flags": "{}"},
    "upsertBucket": {"bucket": BUCKET, "inserted": True},
    "model(": None,
}


class Answer(BaseHTTPRequestHandler):
    """What is asked for and known; everything else is empty."""

    def do_POST(self) -> None:
        asked = self.rfile.read(int(self.headers["content-length"])).decode()
        known = {name.rstrip("("): value for name, value in ANSWERS.items() if name in asked}
        content = json.dumps({"data": known} if "graphql" in self.path else {}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        """Nothing."""


def main(folder: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    serving = multiprocessing.get_context("fork").Process(target=server.serve_forever)
    serving.start()
    server.server_close()  # the other process has it; with that one it is gone
    os.environ["WANDB_BASE_URL"] = f"http://127.0.0.1:{server.server_port}"
    os.environ["WANDB_API_KEY"] = "0" * 40
    wandb_run.LONGEST_UPLOAD_S = 1.0
    where = SimpleNamespace(mode="online", project="tests", entity=None, group=None, tags=[])
    try:
        run = wandb_run.start_wandb(where, name="t", run_id="online12", run_dir=folder, config={})
    finally:
        serving.kill()
        serving.join()
    begun = time.monotonic()
    run.log({"tokens": 1, "train/loss_lm": 1.0})
    recorded = time.monotonic()
    run.finish()
    print(json.dumps({"log_s": recorded - begun, "finish_s": time.monotonic() - recorded}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
