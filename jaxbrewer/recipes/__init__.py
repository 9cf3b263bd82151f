"""A job in one file: from a folder and a data file to a better student."""

from .predicting import predict
from .run import RecipeRun, run_recipe
from .schema import Data, Named, Recipe, Student

__all__ = ["Data", "Named", "Recipe", "RecipeRun", "Student", "predict", "run_recipe"]
