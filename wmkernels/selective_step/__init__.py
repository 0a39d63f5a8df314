"""A single step of the selective scan."""
