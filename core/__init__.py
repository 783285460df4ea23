"""Depthcut's core: everything that is not a page. No Streamlit import outside core/ui."""

__version__ = "0.1.0"
