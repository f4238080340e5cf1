"""A trained run for others: its weights as a folder, with a model card, and to and from the Hugging Face hub."""
