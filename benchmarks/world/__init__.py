"""The parts of benchmarks/world_model.py."""
