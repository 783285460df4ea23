"""Choosing blocks and cutting them out."""
