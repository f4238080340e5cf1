"""Diffusion in the papers' notation: the path, noise schedules, predictions, guidance, samplers. Pure functions only."""
