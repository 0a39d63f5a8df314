"""What is learned from: observations' spaces, sequence chunks, batches, replay."""
