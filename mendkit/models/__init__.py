"""A frozen base model: its text, its edit sites, and its lower part, which runs once for each text."""
