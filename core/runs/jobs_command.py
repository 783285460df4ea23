"""``python -m core jobs list``, or show, cancel, restart, rename and delete a run."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from core.errors import OptionError
from core.runs import jobs
from core.runs.spec import option
from core.runs.workspace import RunRecord, Workspace

ACTIONS = ("list", "show", "cancel", "restart", "rename", "delete")


@dataclass(frozen=True, kw_only=True)
class JobsSpec:
    """List, show, cancel, restart, rename and delete runs."""

    action: str = option("list", positional=True, help="What to do.", choices=ACTIONS)
    run: str = option("", positional=True, help="A run's id, name or path.")
    name: str = option("", positional=True, help="The new name, for rename.")
    grace: float | None = option(
        None, help="Time a cancelled run is given to stop before it is killed.", unit="s", low=0
    )


def describe(record: RunRecord, *, full: bool = False) -> dict[str, Any]:
    """Return a run as JSON values; ``full`` adds spec, command line and log tail."""
    done, total, message = record.progress
    value: dict[str, Any] = {
        "id": record.id,
        "name": record.name,
        "tags": list(record.remarks.tags),
        "note": record.remarks.note,
        "starred": record.remarks.starred,
        "command": record.command,
        "state": record.state,
        "device": record.device,
        "place": record.place,
        "waiting_for": record.waiting_for,
        "progress": {"done": done, "total": total, "message": message},
        "eta_s": record.eta_s,
        "created": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.started)),
        "error": record.error,
        "hint": record.hint,
        "path": str(record.path),
    }
    if full:
        value |= {"argv": record.argv, "spec": record.spec, "log": record.log_tail().splitlines()}
        value |= {"metrics": record.metrics()[-5:], "place_facts": record.place_facts()}
    return value


def run(spec: JobsSpec) -> dict[str, Any]:
    """Perform ``spec.action``."""
    where = Workspace()
    if spec.action == "list":
        return {"workspace": str(where.root), "runs": [describe(r) for r in where.runs()]}
    if not spec.run:
        raise OptionError(
            f"jobs {spec.action} needs a run.", "List the runs with: python -m core jobs list."
        )
    record = where.find(spec.run)
    if spec.action == "cancel":
        record = jobs.cancel(record, spec.grace)
    elif spec.action == "restart":
        record = jobs.restart(record)
    elif spec.action == "rename":
        record = where.rename(record, spec.name)
    elif spec.action == "delete":
        where.delete(record)
        return {"deleted": record.id}
    return describe(record, full=True)
