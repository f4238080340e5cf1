"""Evaluators: a generator and a data set in, named numbers and pictures out."""
