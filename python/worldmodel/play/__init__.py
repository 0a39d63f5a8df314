"""Playing in a world, in a browser or a terminal."""
