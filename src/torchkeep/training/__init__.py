"""The hall: sample → gradient → run."""
