"""Functions that stages of a chain derive with, see `chain_derive`. Each searches for values of later configs.

They may evaluate, and train through the same loop in sub-runs of their own workdir.
"""
