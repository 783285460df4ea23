"""The README.md of an imported checkpoint."""

from __future__ import annotations

from core.checkpoint.imported import Imported


def text(record: Imported, parameters: int) -> str:
    """Return the model card: what the file was, how it was stored, licence and source."""
    title = record.title or record.file
    licence = [f"license: {record.license}"] if _is_identifier(record.license) else []
    rows = {
        "file": record.file,
        "SHA-256": record.sha256,
        "size": f"{record.bytes:,} bytes",
        "stored as": f"{record.how_stored} (shares of the parameters)",
        "source": record.origin,
        "license": record.license,
        "weights here": record.dtype,
        "parameters": f"{parameters:,}",
    }
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        *licence,
        "---",
        "",
        f"# {title}, from GGUF",
        "",
        record.summary,
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {name} | {value} |" for name, value in rows.items() if value),
        "",
        *(f"{note}\n" for note in record.notes),
        "import.json records this; variants of this checkpoint keep a copy.",
        "",
    ]
    return "\n".join(lines)


def _is_identifier(name: str) -> bool:
    return bool(name) and all(c.isalnum() or c in ".-" for c in name)
