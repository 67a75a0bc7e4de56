"""The builders: one module per backend."""
