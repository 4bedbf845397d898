"""One wandb run: started as the recipe's `wandb` section says, fed by training and by evaluations.

`train/metrics.py` and `eval/wandb_evaluation.py` write to it, on rank 0. The x-axis is training tokens:
`define_metric` ties every series to it, because a resumed run repeats steps and wandb drops points whose
own step goes backwards.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

LONGEST_UPLOAD_S = 900.0
"""How long the end of a run waits for its uploads. Without a limit wandb tries for hours after a network is
lost, with every GPU held; what is left stays in the run's folder for `wandb sync`."""


class Table(NamedTuple):
    """Columns and rows, before they become a `wandb.Table`."""

    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]


def start_wandb(
    settings: Any,
    *,
    name: str,
    run_id: str,
    run_dir: Path,
    config: dict[str, Any],
    group: str | None = None,
    job_type: str | None = None,
) -> WandbRun | None:
    """Start or continue the wandb run, or return None where the recipe says `disabled`.

    Args:
        settings: the recipe's `wandb` section.
        run_id: stays the same over resumes of one run folder.
        group: where the recipe names none.

    Raises:
        ValueError: online without an account or a network, in one sentence.
    """
    if settings.mode == "disabled":
        return None
    # Imported here because importing wandb takes a second that a disabled run need not spend.
    import wandb

    try:
        run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            group=settings.group or group,
            job_type=job_type,
            tags=settings.tags or None,
            name=name,
            id=run_id,
            resume="allow",
            mode=settings.mode,
            dir=str(run_dir),
            config=config,
            settings=wandb.Settings(
                silent=settings.mode == "offline", console="off", finish_timeout=LONGEST_UPLOAD_S
            ),
        )
    except wandb.errors.Error as error:
        first = str(error).strip().split("\n")[0]
        raise ValueError(
            f"wandb.mode=online did not start ({first}): run `wandb login`, set WANDB_API_KEY, "
            "or use wandb.mode=offline"
        ) from None
    run.define_metric("tokens")
    run.define_metric("step", hidden=True)
    run.define_metric("*", step_metric="tokens")
    return WandbRun(run)


class WandbRun:
    """A started run. What fails from here on is told once and ends nothing: the files have every number.

    wandb's own process keeps points until a lost network is back. But artifacts ask the server first, and
    where that process is gone (killed for memory, disk full) every call raises.
    """

    def __init__(self, run: Any) -> None:
        self._run = run
        self._warned = False

    def log(self, values: Mapping[str, Any]) -> None:
        """Record one point; `tokens` is among the values."""
        self._attempt(lambda run: run.log(dict(values)))

    def log_tables(self, head: Mapping[str, Any], tables: Mapping[str, Table]) -> None:
        """Record tables by name, in one point with `head`."""

        def send(run: Any) -> None:
            import wandb

            made = {
                name: wandb.Table(columns=list(table.columns), data=[list(r) for r in table.rows])
                for name, table in tables.items()
            }
            run.log({**head, **made})

        self._attempt(send)

    def log_page(self, head: Mapping[str, Any], name: str, page: Path) -> None:
        """Record a HTML file as it is now."""

        def send(run: Any) -> None:
            import wandb

            # `inject` would add wandb's style sheet to a page that has its own.
            run.log({**head, name: wandb.Html(str(page), inject=False)})

        self._attempt(send)

    def log_artifact(
        self, name: str, kind: str, files: Mapping[str, Path], metadata: Mapping[str, Any]
    ) -> None:
        """Record files under their names in the artifact; the same content again is the same version."""

        def send(run: Any) -> None:
            import wandb

            artifact = wandb.Artifact(name, type=kind, metadata=dict(metadata))
            for inside, path in files.items():
                artifact.add_file(str(path), name=inside)
            run.log_artifact(artifact)

        self._attempt(send)

    def finish(self, *, failed: bool = False) -> None:
        """Close the run; returns when everything is written, and sent as far as that goes in time."""
        import wandb

        self._attempt(lambda run: run.finish(exit_code=1 if failed else 0))
        # `finish` may return before wandb's own process has written the file; this waits for it.
        self._attempt(lambda run: wandb.teardown())

    def _attempt(self, send: Callable[[Any], None]) -> None:
        try:
            send(self._run)
        except Exception as error:  # wandb's errors have no common class, and none may end a run
            if not self._warned:
                said = " ".join(f"{type(error).__name__}: {error}".split())
                print(
                    f"warning: wandb failed ({said}); every number is in the run's folder",
                    file=sys.stderr,
                    flush=True,
                )
            self._warned = True
