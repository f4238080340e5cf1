"""Where images are collected from: one file is one kind of source."""
