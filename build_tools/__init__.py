"""Builds the native extension."""
