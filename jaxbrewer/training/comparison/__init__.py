"""Whether the job of a run that is resumed is the one that was saved."""
