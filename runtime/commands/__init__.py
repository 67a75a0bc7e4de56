"""The command `turbochain`: generate, verify, inspect, bench, export-web."""
