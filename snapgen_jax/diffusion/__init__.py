"""Diffusion in the papers' notation: the path, schedules, predictions, guidance, samplers. Pure functions only."""
