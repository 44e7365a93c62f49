"""The PyTorch integration: captures and restores modules, optimizers, tensors and the values beside them."""
