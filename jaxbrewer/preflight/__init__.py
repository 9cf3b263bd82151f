"""What is known before anything compiles: a program for the step, or a report of all that is wrong."""

from .job import Job, Projections, Task
from .prepare import Prepared, prepare
from .report import describe

__all__ = ["Job", "Prepared", "Projections", "Task", "describe", "prepare"]
