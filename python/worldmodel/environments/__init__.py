"""Environments: the registry, vector environments, and the ones that come with the package."""
