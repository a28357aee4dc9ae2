"""The one exception that the command line turns into one sentence and exit code 2."""

from __future__ import annotations


class TrainError(ValueError):
    """Something that a user can set right: an option, a dataset, a checkpoint."""
