"""Rectified flow in the papers' notation: the path, timestep densities, guidance, samplers. Pure functions only."""
