"""What verbs print for people: one module per kind of result, no figures of their own."""
