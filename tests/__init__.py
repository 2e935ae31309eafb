"""A package, so that helpers import as `tests.<name>` whatever else is installed."""
