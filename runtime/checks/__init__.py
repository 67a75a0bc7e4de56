"""Compare what an engine makes with what diffusers produced."""
