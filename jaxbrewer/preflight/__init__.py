"""What is known before anything compiles: a program for the step, or one report of all that is wrong."""
