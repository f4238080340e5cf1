"""One file per published network: which of its tensors make which of our parameters."""
