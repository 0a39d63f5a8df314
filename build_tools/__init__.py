"""How the native extension is built: find the tools, write a ninja file, run it, say what came of it."""
