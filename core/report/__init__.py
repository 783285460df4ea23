"""The report of a study: one self-contained HTML file, and the study as a zip."""
