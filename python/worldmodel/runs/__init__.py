"""A run's folder, its configuration and its files."""
