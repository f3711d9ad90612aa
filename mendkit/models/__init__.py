"""Frozen base models: loading, edit sites, tokens, and the lower part run once per text."""
