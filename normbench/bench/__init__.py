"""The project's own speed benchmark: sides that take turns in one run, their ratios, with spread."""
