"""Byte-level language models: memories by the length of their context."""
