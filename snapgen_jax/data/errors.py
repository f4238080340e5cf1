"""What can be wrong with data."""


class DataError(ValueError):
    """A data set cannot be used as it is. The message says what was wrong, what was expected and what to change."""


class UnreadableExampleError(Exception):
    """One example cannot be read. The pipeline replaces it, counts it and names it."""
