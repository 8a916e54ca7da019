"""SafeRedir in PyTorch: the method, its training and evaluation, and the embedded world."""
