"""Datasets on the Hugging Face Hub, loaded through ``datasets``."""

from __future__ import annotations

from pathlib import Path

from core.data.readers import Row
from core.errors import DataError


def hub_rows(source: str) -> list[Row]:
    """Load ``hub:NAME[/CONFIG][:SPLIT][:FIELD]``; NAME may have one slash, or be a folder."""
    name, _, rest = source.removeprefix("hub:").partition(":")
    split, _, field = rest.partition(":")
    parts = name.split("/")
    folder = Path(name).is_dir()
    repository = name if folder or len(parts) < 3 else "/".join(parts[:2])
    config = None if folder or len(parts) < 3 else "/".join(parts[2:])
    try:
        import datasets
    except ImportError:
        raise DataError(
            "Datasets on the Hub need the package datasets, which is not installed.",
            "Install it, or give a local file.",
        ) from None
    try:
        loaded = datasets.load_dataset(repository, config, split=split or "train")
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise DataError(
            f"Cannot load the dataset '{source}': {reason}.",
            "Check its name, its split and your connection, or give a local file.",
        ) from error
    if field and field not in loaded.column_names:
        raise DataError(
            f"{source} has no field '{field}'.", f"Its fields: {', '.join(loaded.column_names)}."
        )
    rows = loaded.to_list()
    return [{"text": row[field]} for row in rows] if field else rows
