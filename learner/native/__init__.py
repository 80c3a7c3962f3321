"""Compiled versions of the learner's hot regions for CPUs; optional, `learner.nn` holds the references."""
