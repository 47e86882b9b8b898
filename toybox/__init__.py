"""The embedded world: procedural objects with a known shape, and their exact renders."""
