"""Other people's checkpoints -> our parameters, read slice by slice straight onto the mesh."""
