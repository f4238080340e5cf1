"""The one training loop, and what it needs. Knows recipes only by their contract (`recipe.py`)."""
