"""Edits by hand."""
