"""Losses: (prediction, target) to one float32 number an example. Pure functions only."""
