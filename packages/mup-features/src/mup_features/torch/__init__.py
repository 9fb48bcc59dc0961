"""muP and feature diagnostics for PyTorch models (extra `[torch]`)."""
