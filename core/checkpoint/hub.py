"""Checkpoints on the Hugging Face Hub: download what is needed, explain what went wrong.

Only config, safetensors and tokenizer files are downloaded, into the Hub's own cache; no pickles
and no code. To inspect a checkpoint the headers of its shards are read in parallel, by range
requests. `core.checkpoint.hub_requests` ends requests that take too long. The user's token is left
to huggingface_hub (its environment variable or its login): it is neither read, logged nor stored
here. A Hub id may carry a revision: ``owner/name@revision``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core import words
from core.checkpoint import headers, hub_requests, other_formats
from core.checkpoint.headers import CheckpointInfo, TensorIndex
from core.checkpoint.tensors import parse_header, weight_map_of
from core.errors import CheckpointError
from core.runs.devices import MIB
from core.runs.progress import SILENT, Progress

_SMALL = (
    "config.json",
    "generation_config.json",
    headers.INDEX,
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
)
_WEIGHTS = (headers.SINGLE, "model-*.safetensors")
_MOST_UNKNOWN = 64 << 20
"""Bytes of a file whose size the Hub does not tell."""
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class _Copy:
    """A checkpoint's folder in the Hub's cache."""

    folder: Path
    commit: str
    sizes: dict[str, int] | None
    """Bytes of every file on the Hub; None if the Hub was not reached."""
    cause: Exception | None = None
    """Why the Hub was not reached; None if it is switched off."""


def fetch(name: str, progress: Progress = SILENT, *, config_only: bool = False) -> Path:
    """Download a checkpoint (with ``config_only`` all but its weights) and return its folder.

    Files that are already in the cache are not downloaded again; if the Hub cannot be reached, a
    complete copy in the cache is used. Raises `CheckpointError` for an unknown, gated or
    unreachable repository and for one without safetensors; `Cancelled` when asked to stop.
    """
    return _fetch(name, progress, config_only).folder


def inspect(name: str, progress: Progress = SILENT) -> tuple[Path, CheckpointInfo]:
    """Return the folder of a checkpoint's config, and what it is, without downloading its weights.

    Config and tokenizer are downloaded; of the weights only the headers are read. If the cache
    holds the whole checkpoint, that copy is inspected. Raises the same errors as `fetch`.
    """
    copy = _fetch(name, progress, config_only=True)
    config = headers.read_config(copy.folder / "config.json")
    if headers.has_weights(copy.folder) and _is_complete(copy.folder):
        return copy.folder, headers.inspect(copy.folder)
    if copy.sizes is None:
        raise _not_cached(name, True, copy.cause)
    progress.check_cancel()
    with _explained(name):
        index = _remote_index(name, copy.commit, copy.folder, copy.sizes, progress)
    info = headers.describe(name, config, index, headers.tokenizer_info(copy.folder))
    note = "Only the headers of the weights were read; the weights are still on the Hub."
    return copy.folder, dataclasses.replace(info, warnings=(*info.warnings, note))


def _fetch(name: str, progress: Progress, config_only: bool) -> _Copy:
    repo, revision = _split(name)
    with _explained(name):
        from huggingface_hub import constants
        from huggingface_hub.errors import HfHubHTTPError

        if constants.HF_HUB_OFFLINE:
            return _cached(name, config_only)
        try:
            commit, sizes = hub_requests.listing(repo, revision, progress)
        except HfHubHTTPError:
            raise
        except Exception as error:
            if not is_connection(error):
                raise
            copy = _cached(name, config_only, error)
            progress.log(f"The Hub cannot be reached; using the copy of {name} in the cache.")
            return copy
        files = _wanted(name, sizes, config_only)
        progress.log(f"Fetching {name} from the Hub ({words.size(sum(sizes[f] for f in files))}).")
        folder = _download(repo, commit, {file: sizes[file] for file in files}, progress)
        _note_revision(repo, revision, progress)
        return _Copy(folder, commit, sizes)


def _split(name: str) -> tuple[str, str | None]:
    repo, _, revision = name.partition("@")
    return repo, revision or None


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _wanted(name: str, sizes: dict[str, int], config_only: bool) -> list[str]:
    """Return the files to download; raises `CheckpointError` if they do not make a checkpoint."""
    ggufs = [file for file in sizes if file.endswith(".gguf")]
    safetensors = any(file.endswith(".safetensors") for file in sizes)
    if other_formats.ADAPTER in sizes and not {headers.SINGLE, headers.INDEX} & sizes.keys():
        raise CheckpointError(
            f"{name} is an adapter ({other_formats.ADAPTER}), not a whole checkpoint.",
            "Download it, merge it onto its base with peft, and give the merged folder.",
        )
    if ggufs and not safetensors:
        raise other_formats.gguf_error(name, ggufs[0], on_hub=True)
    if "config.json" not in sizes:
        raise CheckpointError(
            f"{name} has no config.json, so it is not a checkpoint.",
            "Give a repository that holds a causal language model.",
        )
    small = [file for file in sizes if _matches(file, _SMALL)]
    if config_only:
        return small
    if headers.SINGLE in sizes:
        return [f for f in small if f != headers.INDEX] + [headers.SINGLE]
    weights = [file for file in sizes if _matches(file, _WEIGHTS)]
    if weights and headers.INDEX in sizes:
        return small + sorted(weights)
    if weights:
        raise CheckpointError(
            f"{name} has safetensors shards but no {headers.INDEX}, which lists them.",
            "Give a revision with the index, or ask the owner to add it.",
        )
    if any(_matches(file, _PICKLES) for file in sizes):
        raise CheckpointError(
            f"The weights of {name} are available only as pickles, which can execute code when "
            "loaded.",
            "Give a repository or revision with safetensors.",
        )
    raise CheckpointError(f"{name} has no safetensors weights.", "Give a repository with weights.")


def _download(repo: str, commit: str, sizes: dict[str, int], progress: Progress) -> Path:
    """Download one file after the other and return the snapshot's folder."""
    from huggingface_hub import hf_hub_download

    total, done = sum(sizes.values()), 0
    folder = Path()
    for file, size in sizes.items():
        progress.check_cancel()
        bar, seen = _bar(progress, done, total, file, size)
        get = functools.partial(hf_hub_download, repo, file, revision=commit, **bar)
        folder = Path(hub_requests.call(get, progress, seen)).parent
        done += size
        progress.step(*_mib(done, total), f"MiB, {file}")
    return folder


def _note_revision(repo: str, revision: str | None, progress: Progress) -> None:
    """Record in the cache which commit the revision is, for use without the Hub."""
    from huggingface_hub import hf_hub_download

    hub_requests.call(lambda: hf_hub_download(repo, "config.json", revision=revision), progress)


def _mib(done: int, total: int) -> tuple[int, int]:
    whole = max(round(total / MIB), 1)
    return min(round(done / MIB), whole) if done < total else whole, whole


def _bar(
    progress: Progress, before: int, total: int, file: str, size: int
) -> tuple[dict[str, Any], Callable[[], int]]:
    """Return the arguments that make a download report its bytes, and what counts them."""
    import inspect as signatures

    from huggingface_hub import hf_hub_download
    from tqdm import tqdm

    received = 0

    class Bar(tqdm):
        """Reports bytes; draws nothing."""

        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)
            super().__init__(*args, **(options | {"file": open(os.devnull, "w")}))  # noqa: SIM115
            self.seen = int(options.get("initial") or 0)

        def update(self, n: float | None = 1) -> bool | None:
            nonlocal received
            self.seen += int(n or 0)
            received += max(0, int(n or 0))
            if self.seen > (size or _MOST_UNKNOWN):
                raise hub_requests.Unusable(f"{file} is longer than its {size:,} bytes")
            progress.step(*_mib(before + self.seen, total), f"MiB, {file}")
            return None

        def close(self) -> None:
            super().close()
            with contextlib.suppress(AttributeError):
                self.fp.close()

    known = signatures.signature(hf_hub_download).parameters
    return ({"tqdm_class": Bar} if "tqdm_class" in known else {}), lambda: received


def _cached(name: str, config_only: bool, cause: Exception | None = None) -> _Copy:
    """Return the copy in the Hub's cache; raises `CheckpointError` if it is not complete."""
    from huggingface_hub import try_to_load_from_cache

    repo, revision = _split(name)
    found = try_to_load_from_cache(repo, "config.json", revision=revision)
    folder = Path(found).parent if isinstance(found, str) else None
    if folder and (config_only or _is_complete(folder)):
        return _Copy(folder, folder.name, None, cause)
    raise _not_cached(name, folder is not None, cause) from cause


def _not_cached(name: str, partly: bool, cause: Exception | None) -> CheckpointError:
    why = "the Hub cannot be reached" if cause else "the Hub is switched off (HF_HUB_OFFLINE)"
    if isinstance(cause, hub_requests.TooSlow):
        why = f"the Hub did not finish answering within {cause}"
    state = "is only partly" if partly else "is not"
    return CheckpointError(
        f"There is no folder {name}, and {why}; the checkpoint {state} in the Hub's cache.",
        "Check the network, HF_ENDPOINT and HF_HUB_OFFLINE, or give a local folder.",
    )


def _is_complete(folder: Path) -> bool:
    try:
        TensorIndex.read(folder)
    except CheckpointError:
        return False
    return True


def _remote_index(
    name: str, commit: str, folder: Path, sizes: dict[str, int], progress: Progress
) -> TensorIndex:
    """Read the headers of all weight files; ``folder`` holds the index file, if there is one."""
    _wanted(name, sizes, False)
    weight_map = {} if headers.SINGLE in sizes else weight_map_of(folder / headers.INDEX)
    files = sorted(set(weight_map.values())) or [headers.SINGLE]
    absent = [file for file in files if file not in sizes]
    if absent:
        raise CheckpointError(
            f"{len(absent)} of {len(files)} weight files are missing in {name}: {absent[0]}.",
            "Give another repository or revision.",
        )
    repo = _split(name)[0]
    advice = f"Give another revision, or download it (hf download {repo}) and give the folder."
    try:
        found = hub_requests.headers(repo, commit, {f: sizes[f] for f in files}, progress)
    except hub_requests.Unusable as error:
        raise CheckpointError(f"Cannot read the weights of {name}: {error}.", advice) from error
    shards = (parse_header(file, sizes[file], found[file], advice) for file in files)
    return TensorIndex(None, tuple(shards)).checked(weight_map)


# ----------------------------------------------------------------------------------------- errors


_CONNECTION_ERRORS = {"NetworkError", "TimeoutException", "ProxyError", "RemoteProtocolError"}
"""Classes of the HTTP client that huggingface_hub uses; the client itself is not imported here."""


def is_connection(error: BaseException | None) -> bool:
    """Whether an exception, or its cause, means that the Hub could not be reached."""
    while error is not None:
        if isinstance(error, hub_requests.TooSlow):
            return True
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if isinstance(error, ConnectionError | TimeoutError) or kinds & _CONNECTION_ERRORS:
            return True
        error = error.__cause__ or error.__context__
    return False


def _unanswered(name: str, error: BaseException) -> CheckpointError:
    """Return the error for a Hub that was not reached, or that asked to wait."""
    wait = hub_requests.retry_after(error)
    if wait is not None:
        return CheckpointError(
            f"The Hub limits requests for {name} and asks to wait {wait:,} s (Retry-After).",
            f"Try again in {wait:,} s, or log in with `hf auth login` for a higher limit.",
        )
    return CheckpointError(
        f"The Hub cannot be reached for {name}, or the connection broke off.",
        "Check the network and HF_ENDPOINT, or give a local folder.",
    )


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn the Hub's exceptions into `CheckpointError`, without their texts, which hold URLs."""
    try:
        from huggingface_hub import errors
    except ImportError as error:
        raise CheckpointError(
            f"There is no folder {name}, and huggingface_hub is not installed.",
            "Give a folder, or install huggingface_hub.",
        ) from error
    try:
        yield
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{name} is gated: you must accept its terms first.",
            f"Request access at https://huggingface.co/{_split(name)[0]}, then log in with "
            "`hf auth login` or set HF_TOKEN.",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(
            f"{_split(name)[0]} has no revision '{_split(name)[1]}'.",
            "Give a branch, tag or commit after the @.",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"There is no folder {name}, and no such repository on the Hub that you can access.",
            "Check the spelling; for a private repository log in with `hf auth login` or set "
            "HF_TOKEN.",
        ) from error
    except hub_requests.Unusable as error:
        raise CheckpointError(
            f"The Hub's answer for {name} cannot be used: {error}.",
            "Check HF_ENDPOINT and the network, or give a local folder.",
        ) from error
    except hub_requests.Busy as error:
        raise _unanswered(name, error) from error
    except hub_requests.TooSlow as error:
        raise CheckpointError(
            f"The Hub did not finish answering for {name} within {error}.",
            "Try again later, set DEPTHCUT_HUB_TIMEOUT (seconds), or give a local folder.",
        ) from error
    except errors.EntryNotFoundError as error:
        if is_connection(error.__cause__) or hub_requests.retry_after(error) is not None:
            raise _unanswered(name, error) from error
        raise CheckpointError(
            f"A file of {name} is missing on the Hub or in the cache.", "Give another revision."
        ) from error
    except errors.HfHubHTTPError as error:
        if hub_requests.retry_after(error) is not None:
            raise _unanswered(name, error) from error
        status = getattr(error.response, "status_code", "an error")
        refused = status in (401, 403)
        raise CheckpointError(
            f"The Hub answered {status} for {name}.",
            "Log in with `hf auth login` or set a valid HF_TOKEN."
            if refused
            else "Try again later.",
        ) from error
    except errors.HFValidationError as error:
        raise CheckpointError(
            f"'{name}' is neither a folder nor a valid Hub id.", "Write owner/name."
        ) from error
    except CheckpointError:
        raise
    except Exception as error:
        if is_connection(error):
            raise _unanswered(name, error) from error
        if isinstance(error, OSError) and error.errno:
            raise CheckpointError(
                f"Cannot store {name} in the Hub's cache: {error.strerror}.",
                "Free up disk space, or set HF_HOME to a folder that you can write to.",
            ) from error
        raise
