"""The kinds of sources: one module each, discovered automatically, with one constant `KIND`."""
