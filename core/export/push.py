"""Push a checkpoint to the Hugging Face Hub, with its model card.

The Hub sees all files in one commit or none, so an upload that fails or is cancelled leaves the
repository as it was (new and empty, if it is a new one). Files that arrived are not sent again.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from core import outside, words
from core.checkpoint import headers, hub, own_code
from core.checkpoint.locate import Checkpoint
from core.errors import DepthcutError, InputError, OptionError, RunError
from core.prune import model_card, staging
from core.prune.results import Pruning
from core.runs.progress import SILENT, Progress

T = TypeVar("T")
TRIES = 3
WAIT_S = 1.0
"""Before the second try; four times as long before the third."""
_POLL_S = 0.1
REPOSITORY = re.compile(r"[\w][\w.-]{0,95}/[\w][\w.-]{0,95}")
_CARD = "README.md"
_FILES = (
    *staging.COMPANIONS,
    "*.safetensors",
    headers.INDEX,
    Pruning.FILE,
    "config.json",
    own_code.MODELLING.name,
)


def files(checkpoint: Checkpoint) -> list[Path]:
    """Return the files of a checkpoint that are pushed, without its model card."""
    found = {p for pattern in _FILES for p in checkpoint.folder.glob(pattern) if p.is_file()}
    foreign = {p for p in found if p.suffix == ".py" and own_code.foreign(checkpoint.folder)}
    return sorted(found - foreign)


def size(checkpoint: Checkpoint) -> int:
    """Return the bytes that are pushed."""
    return sum(path.stat().st_size for path in files(checkpoint))


def push(
    checkpoint: Checkpoint, repo: str, *, public: bool = False, progress: Progress = SILENT
) -> str:
    """Create the repository if it does not exist, upload the files, and return its address.

    The token is the login's or HF_TOKEN's; it is never shown. Faults of the network are retried.
    Names of local folders in the card and in pruning.json are shortened to their last part.

    Raises `OptionError` for a name that is not OWNER/NAME, `InputError` without a login or if the
    Hub refuses it, and `RunError` if the Hub cannot be reached.
    """
    if not REPOSITORY.fullmatch(repo):
        raise OptionError(f"--repo {outside.brief(repo)} is not a repository.", "Write OWNER/NAME.")
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.utils import disable_progress_bars

    if get_token() is None:
        raise InputError(
            "Pushing to the Hub needs a login.", "Log in with `hf auth login`, or set HF_TOKEN."
        )
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise InputError("The Hub is switched off (HF_HUB_OFFLINE).", "Unset HF_HUB_OFFLINE.")
    disable_progress_bars()
    api, added = HfApi(), list(_additions(checkpoint))
    progress.step(0, 2, f"Creating {repo}")
    made = _tried(lambda: api.create_repo(repo, private=not public, exist_ok=True), repo, progress)
    progress.step(1, 2, f"Uploading {words.size(size(checkpoint))}")
    message = f"{checkpoint.info.blocks} blocks, {checkpoint.info.parameters:,} parameters"
    # upload_folder may split into several commits, between which the checkpoint is incomplete
    _tried(lambda: api.create_commit(repo, added, commit_message=message), repo, progress)
    progress.step(2, 2, "Uploaded")
    return str(made)


# ------------------------------------------------------------------------------------------ files


def _additions(checkpoint: Checkpoint) -> Iterator[Any]:
    """Yield what the commit adds: the files, the record without paths, and the card."""
    from huggingface_hub import CommitOperationAdd

    record = Pruning.read(checkpoint.folder)
    names = _local_names(record, checkpoint)
    for path in files(checkpoint):
        if path.name == Pruning.FILE:
            yield CommitOperationAdd(path.name, _shortened(outside.text(path), names).encode())
        else:
            yield CommitOperationAdd(path.name, path)
    card = checkpoint.folder / _CARD
    text = outside.text(card) if outside.is_file(card) else _own_card(checkpoint, record)
    yield CommitOperationAdd(_CARD, _shortened(text, names).encode())


def _local_names(record: Pruning | None, checkpoint: Checkpoint) -> dict[str, str]:
    """Return the names of local folders in a record -> their last parts; the longest first."""
    given = [str(checkpoint.folder)]
    if record:
        given += [record.source, record.base_model, *(c.source or "" for c in record.lineage)]
    local = {n for n in given if "/" in n and (outside.exists(n) or not REPOSITORY.fullmatch(n))}
    return {name: Path(name).name for name in sorted(local, key=len, reverse=True)}


def _shortened(text: str, names: dict[str, str]) -> str:
    for name, short in names.items():
        text = text.replace(json.dumps(name)[1:-1], short).replace(name, short)
    return text


def _own_card(checkpoint: Checkpoint, record: Pruning | None) -> str:
    """Return a card for a checkpoint that has none, e.g. a retrained one."""
    base = record.base_model if record else ""
    custom = own_code.is_trusted(checkpoint.folder)
    kept = f"{checkpoint.info.blocks} blocks, {checkpoint.info.parameters:,} parameters"
    title = f"{base.rpartition('/')[2] or 'Checkpoint'}, {kept}"
    title = words.markdown(title)
    lines = model_card.front_matter(base, "depthcut") if record else []
    if record:
        method = "depth" if record.method == "depth" else f"width ({record.method})"
        # `retrain --merge` writes the whole checkpoint into this folder of its run
        then = ", then retrained" if checkpoint.folder.name == "merged" else ""
        text = f"Pruned in {words.markdown(method)} from {words.markdown(base)} by Depthcut{then}."
        lines += [f"# {title}", "", text, ""]
    else:
        lines += [f"# {title}", ""]
    end = model_card.loading(custom)
    return "\n".join([*lines, *(end if record else end[:-2])])


# ---------------------------------------------------------------------------------------- requests


def _tried(request: Callable[[], T], repo: str, progress: Progress) -> T:
    """Return what ``request`` returns; faults of the network and busy servers are tried again."""
    for attempt in range(TRIES):
        try:
            return _watched(request, progress)
        except Exception as error:
            known = _explained(error, repo)
            if not isinstance(known, RunError) or attempt == TRIES - 1:
                raise known from error
            wait = WAIT_S * 4**attempt
            progress.log(f"{known.message} Next try in {wait:g} s.")
            end = time.monotonic() + wait
            while time.monotonic() < end:
                progress.check_cancel()
                time.sleep(min(_POLL_S, wait))
    raise AssertionError("unreachable")


def _watched(request: Callable[[], T], progress: Progress) -> T:
    """Return what ``request`` returns, run in another thread so that a cancelled run ends soon."""
    results: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(request())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True, name="push")
    thread.start()
    while thread.is_alive():
        progress.check_cancel()
        thread.join(_POLL_S)
    if errors:
        raise errors[0]
    return results[0]


def _explained(error: Exception, repo: str) -> Exception:
    """Return an error in one sentence; `RunError` if another try may help."""
    if isinstance(error, DepthcutError):
        return error
    status = _status(error)
    if status in (401, 403):
        return InputError(
            f"The Hub does not let this login write to {repo} ({status}).",
            "Log in with `hf auth login`, or set HF_TOKEN, with a token that may write there.",
        )
    if status == 404:
        return InputError(
            f"The Hub has no place for {repo} (404).", "Check the owner's name, and your login."
        )
    if status is not None and 400 <= status < 500 and status != 429:
        return InputError(
            f"The Hub refused {repo} with {status}: {outside.brief(_reason(error), 200)}.",
            "Check the repository's name and settings.",
        )
    if status is not None:
        return RunError(f"The Hub answered {status} for {repo}.", "Try again later.")
    if hub.is_connection(error):
        return RunError(
            f"The Hub cannot be reached for {repo}, or the connection broke off; nothing was "
            "committed.",
            "Check the network and HF_ENDPOINT, then try again: files that arrived are kept.",
        )
    return error


def _status(error: BaseException | None) -> int | None:
    """Return the HTTP status behind an exception or its causes."""
    while error is not None:
        found = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(found, int):
            return found
        error = error.__cause__ or error.__context__
    return None


def _reason(error: Any) -> str:
    return getattr(error, "server_message", None) or type(error).__name__
