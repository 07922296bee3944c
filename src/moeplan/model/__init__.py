"""Models by their dimensions: one description, the reader of config.json, the catalogue."""
