"""Our networks beside PyTorch on one GPU: `python -m benchmarks.gpu`, see `__main__.py`."""
