"""Datasets of the library ``datasets``: on the Hugging Face Hub, or saved in a folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from core import outside
from core.errors import DataError

SPLITS = "dataset_dict.json"
STATE = "state.json"
"""Files of a folder written by ``save_to_disk``: of several splits, and of one."""


def split_name(source: str) -> tuple[str, str | None, str, str]:
    """Split ``hub:NAME[/CONFIG][:SPLIT][:FIELD]`` into repository, config, split and field.

    NAME may have one slash, or be a folder.
    """
    name, _, rest = source.removeprefix("hub:").partition(":")
    split, _, field = rest.partition(":")
    parts = name.split("/")
    if outside.is_folder(name) or len(parts) < 3:
        return name, None, split or "train", field
    return "/".join(parts[:2]), "/".join(parts[2:]), split or "train", field


def hub_rows(source: str, *, stream: bool = False) -> Iterator[dict[str, Any]]:
    """Yield the rows of a dataset on the Hub; with ``stream``, only those asked for are loaded.

    A dataset that cannot be streamed, e.g. without a connection, is loaded from the local copy.
    """
    repository, config, split, _ = split_name(source)
    datasets = _library("Datasets on the Hub need")
    try:
        if stream:
            try:
                rows = iter(datasets.load_dataset(repository, config, split=split, streaming=True))
                first = next(rows, None)
            except Exception:
                stream = False
            else:
                if first is not None:
                    yield first
        if not stream:
            rows = iter(datasets.load_dataset(repository, config, split=split))
        yield from rows
    except GeneratorExit:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise DataError(
            f"Cannot load the dataset '{source}': {reason}.",
            "Check its name, its split and your connection, or give a local file.",
        ) from error


def is_saved(path: Path) -> bool:
    """Whether a folder was written by ``save_to_disk``."""
    return outside.is_file(path / SPLITS) or outside.is_file(path / STATE)


def saved_folder(path: Path) -> Path:
    """Return the folder of one split: ``path``, its split ``train``, or its only one."""
    if not is_saved(path):
        raise DataError(
            f"{path} is a folder, but not one written by save_to_disk of datasets or by generate.",
            "Give a file in it, or hub:FOLDER for a folder of data files.",
        )
    if not outside.is_file(path / SPLITS):
        return path
    found = sorted(p.name for p in path.iterdir() if outside.is_file(p / STATE))
    if len(found) == 1 or "train" in found:
        return path / ("train" if "train" in found else found[0])
    raise DataError(
        f"{path} has several splits: {', '.join(found) or 'none that can be read'}.",
        f"Name one, e.g. {path}/{found[0] if found else 'SPLIT'}.",
    )


def saved_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a folder written by ``save_to_disk``; they stay on disk until asked for."""
    datasets = _library("A saved dataset needs")
    folder = saved_folder(path)
    try:
        yield from datasets.load_from_disk(str(folder))
    except GeneratorExit:
        raise
    except Exception as error:
        reason = outside.brief((str(error).splitlines() or [type(error).__name__])[0], 200)
        raise DataError(
            f"Cannot load the saved dataset {folder}: {reason}.", "Save it again with datasets."
        ) from error


def _library(what: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{what} the package datasets, which is not installed.",
            "Install it, or give a local file.",
        ) from None
    return datasets
