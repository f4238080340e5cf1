"""Networks: tensors to tensors. Each is an `nnx.Module` built from a frozen dataclass config."""
