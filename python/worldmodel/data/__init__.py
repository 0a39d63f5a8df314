"""Training data: specs, sequence chunks, batches, replay."""
