"""Checkpoints on the Hugging Face Hub: fetch what is needed, tell plainly what went wrong.

Only config, safetensors and tokenizer files are downloaded, into the Hub's own cache; no pickles
and no code. The user's token is left to huggingface_hub (its environment variable or its login):
it is neither read, logged nor stored here. A Hub id may carry a revision: ``owner/name@revision``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from core import words
from core.checkpoint import headers
from core.checkpoint.headers import CheckpointInfo, Shard, TensorEntry, TensorIndex
from core.errors import CheckpointError
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
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def fetch(name: str, progress: Progress = SILENT, *, config_only: bool = False) -> Path:
    """Download a checkpoint (or, with ``config_only``, all but its weights) and return its folder.

    Files that are in the cache already are not downloaded again; when the Hub cannot be reached, a
    complete copy in the cache is used. Raises `CheckpointError` for an unknown, gated or
    unreachable repository, and where it holds no safetensors; `Cancelled` when asked to stop.
    """
    repo, revision = _split(name)
    with _explained(name):
        from huggingface_hub import constants
        from huggingface_hub.errors import HfHubHTTPError

        if constants.HF_HUB_OFFLINE:
            return _cached(name, config_only)
        try:
            commit, sizes = _listing(repo, revision)
        except HfHubHTTPError:
            raise
        except Exception as error:
            if not _is_connection(error):
                raise
            folder = _cached(name, config_only, error)
            progress.log(f"The Hub cannot be reached; using the copy of {name} in the cache.")
            return folder
        files = _wanted(name, sizes, config_only)
        progress.log(f"Fetching {name} from the Hub ({words.size(sum(sizes[f] for f in files))}).")
        folder = _download(repo, commit, {file: sizes[file] for file in files}, progress)
        _note_revision(repo, revision)
        return folder


def inspect(name: str, progress: Progress = SILENT) -> CheckpointInfo:
    """Return what a checkpoint on the Hub is, without downloading its weights.

    Config and tokenizer are downloaded; of the weights only the headers are read, by range
    requests. A complete copy in the cache is inspected when the Hub is offline. Raises as `fetch`.
    """
    repo, revision = _split(name)
    folder = fetch(name, progress, config_only=True)
    config = headers.read_config(folder / "config.json")
    if headers.has_weights(folder) and _is_complete(folder):
        return headers.inspect(folder)
    with _explained(name):
        index = _remote_index(repo, revision, folder)
    info = headers.describe(name, config, index, headers.tokenizer_info(folder))
    note = "Only the headers of the weights were read; the weights are still on the Hub."
    return dataclasses.replace(info, warnings=(*info.warnings, note))


def _split(name: str) -> tuple[str, str | None]:
    repo, _, revision = name.partition("@")
    return repo, revision or None


def _listing(repo: str, revision: str | None) -> tuple[str, dict[str, int]]:
    """Return the commit and the size of every file at the repository's top."""
    from huggingface_hub import HfApi

    info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    sizes = {
        file.rfilename: int(file.size or 0)
        for file in info.siblings or []
        if "/" not in file.rfilename
    }
    return str(info.sha), sizes


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _wanted(name: str, sizes: dict[str, int], config_only: bool) -> list[str]:
    """Return the files to download; raises where these cannot make a checkpoint."""
    if "config.json" not in sizes:
        raise CheckpointError(
            f"{name} has no config.json, so it is not a checkpoint.",
            "Give a repository with a causal language model.",
        )
    small = [file for file in sizes if _matches(file, _SMALL)]
    if config_only:
        return small
    if headers.SINGLE in sizes:
        return [f for f in small if f != headers.INDEX] + [headers.SINGLE]
    weights = [file for file in sizes if _matches(file, _WEIGHTS)]
    if weights and headers.INDEX in sizes:
        return small + sorted(weights)
    if any(_matches(file, _PICKLES) for file in sizes):
        raise CheckpointError(
            f"The weights of {name} are only there as pickles, which may run code when loaded.",
            "Only safetensors are read: give a repository or revision that has them.",
        )
    raise CheckpointError(f"{name} has no safetensors weights.", "Give a repository with weights.")


def _download(repo: str, commit: str, sizes: dict[str, int], progress: Progress) -> Path:
    """Download one file after the other and return the snapshot's folder."""
    from huggingface_hub import hf_hub_download

    total, done = sum(sizes.values()), 0
    folder = Path()
    for file, size in sizes.items():
        progress.check_cancel()
        bar = _bar(progress, done, total, file)
        folder = Path(hf_hub_download(repo, file, revision=commit, **bar)).parent
        done += size
        progress.step(*_mib(done, total), f"MiB, {file}")
    return folder


def _note_revision(repo: str, revision: str | None) -> None:
    """Let the cache note which commit the revision is, for when the Hub cannot be reached."""
    from huggingface_hub import hf_hub_download

    hf_hub_download(repo, "config.json", revision=revision)


def _mib(done: int, total: int) -> tuple[int, int]:
    whole = max(round(total / 2**20), 1)
    return min(round(done / 2**20), whole) if done < total else whole, whole


def _bar(progress: Progress, before: int, total: int, file: str) -> dict[str, Any]:
    """Return the arguments that make a download report its bytes, where the library can."""
    import inspect as signatures

    from huggingface_hub import hf_hub_download
    from tqdm import tqdm

    class Bar(tqdm):
        """Passes on bytes; draws nothing."""

        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)
            super().__init__(*args, **(options | {"file": open(os.devnull, "w")}))  # noqa: SIM115
            self.seen = int(options.get("initial") or 0)

        def update(self, n: float | None = 1) -> bool | None:
            self.seen += int(n or 0)
            progress.step(*_mib(before + self.seen, total), f"MiB, {file}")
            return None

        def close(self) -> None:
            super().close()
            with contextlib.suppress(AttributeError):
                self.fp.close()

    known = signatures.signature(hf_hub_download).parameters
    return {"tqdm_class": Bar} if "tqdm_class" in known else {}


def _cached(name: str, config_only: bool, cause: Exception | None = None) -> Path:
    """Return the copy in the Hub's cache; raises `CheckpointError` where it is not complete."""
    from huggingface_hub import try_to_load_from_cache

    repo, revision = _split(name)
    found = try_to_load_from_cache(repo, "config.json", revision=revision)
    folder = Path(found).parent if isinstance(found, str) else None
    if folder and (config_only or _is_complete(folder)):
        return folder
    why = "the Hub cannot be reached" if cause else "the Hub is switched off (HF_HUB_OFFLINE)"
    state = "is only partly" if folder else "is not"
    raise CheckpointError(
        f"There is no folder {name}, and {why}; the checkpoint {state} in the Hub's cache.",
        "Check the network, HF_ENDPOINT and HF_HUB_OFFLINE, or give a local folder.",
    ) from cause


def _is_complete(folder: Path) -> bool:
    try:
        TensorIndex.read(folder)
    except CheckpointError:
        return False
    return True


def _remote_index(repo: str, revision: str | None, folder: Path) -> TensorIndex:
    """Read the headers of all weight files by range requests."""
    from huggingface_hub import HfApi

    commit, sizes = _listing(repo, revision)
    files = [headers.SINGLE]
    weight_map: dict[str, str] = {}
    if headers.SINGLE not in sizes:
        _wanted(f"{repo}", sizes, False)
        weight_map = headers.read_config(folder / headers.INDEX).get("weight_map") or {}
        files = sorted(set(weight_map.values()))
    absent = [file for file in files if file not in sizes]
    if absent:
        raise CheckpointError(
            f"{len(absent)} of {len(files)} weight files are missing in {repo}: {absent[0]}.",
            "Give another repository or revision.",
        )
    api = HfApi()
    shards = []
    for file in files:
        header = api.parse_safetensors_file_metadata(repo, file, revision=commit)
        shards.append(_shard(file, sizes[file], header))
    return TensorIndex(None, tuple(shards)).checked(weight_map)


def _shard(file: str, size: int, header: Any) -> Shard:
    end = max((t.data_offsets[1] for t in header.tensors.values()), default=0)
    base = size - end
    if base < 8:
        raise CheckpointError(
            f"{file} is truncated on the Hub: it has {size:,} bytes, its tensors take {end:,}.",
            "Give another revision.",
        )
    tensors = [
        TensorEntry(
            name,
            file,
            headers.dtype_name(item.dtype),
            tuple(item.shape),
            base + item.data_offsets[0],
            base + item.data_offsets[1],
        )
        for name, item in header.tensors.items()
    ]
    tensors.sort(key=lambda tensor: tensor.start)
    return Shard(file, size, dict(header.metadata or {}), tuple(tensors))


# ----------------------------------------------------------------------------------------- errors


def _is_connection(error: BaseException | None) -> bool:
    """Whether an exception (or what caused it) is that the Hub could not be reached."""
    while error is not None:
        name = type(error).__name__
        if isinstance(error, ConnectionError | TimeoutError) or (
            "Connect" in name or "Timeout" in name or name == "OfflineModeIsEnabled"
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn the Hub's exceptions into `CheckpointError`; its texts (with URLs) are left out."""
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
            f"{name} is gated: its owner lets only those in who accepted the terms.",
            f"Ask for access on the page of {_split(name)[0]}, then log in with `hf auth login` "
            "or set HF_TOKEN.",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(
            f"{_split(name)[0]} has no revision '{_split(name)[1]}'.",
            "Give a branch, tag or commit after the @.",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"There is no folder {name}, and no such repository on the Hub that you may read.",
            "Check the spelling; for a private one log in with `hf auth login` or set HF_TOKEN.",
        ) from error
    except errors.EntryNotFoundError as error:
        raise CheckpointError(
            f"A file of {name} is missing on the Hub or in the cache.", "Give another revision."
        ) from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "an error")
        refused = status in (401, 403)
        raise CheckpointError(
            f"The Hub answered {status} for {name}.",
            "Log in with `hf auth login` or set a valid HF_TOKEN." if refused else "Try again.",
        ) from error
    except errors.HFValidationError as error:
        raise CheckpointError(
            f"'{name}' is neither a folder nor a valid Hub id.", "Write owner/name."
        ) from error
    except CheckpointError:
        raise
    except Exception as error:
        if _is_connection(error):
            raise CheckpointError(
                f"The Hub cannot be reached for {name}.",
                "Check the network and HF_ENDPOINT, or give a local folder.",
            ) from error
        if isinstance(error, OSError) and error.errno:
            raise CheckpointError(
                f"Cannot keep {name} in the Hub's cache: {error.strerror}.",
                "Free space, or set HF_HOME to a folder that you may write to.",
            ) from error
        raise
