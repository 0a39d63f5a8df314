"""torch.nn modules built on the ops."""
