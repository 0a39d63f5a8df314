"""The world model: memory, perception, prediction, evaluation and decision."""
