"""Tasks: OSWorld task files, and what brings a clean desktop to where a task begins."""
