"""Archives and recorded numbers of published code."""
