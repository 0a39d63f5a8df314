"""The native extension's build: find the tools, write a ninja file, run it, report."""
