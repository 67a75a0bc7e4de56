"""Run the phases of a build, each in a process of its own."""
