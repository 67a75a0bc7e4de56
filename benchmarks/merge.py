"""Merge results files of one source, size and kind of machine into one: `merge.py A.json B.json -o C.json`.

Every row of C.json names its run, and every run its commit, date and the file that it comes from. A row of a later
file takes the place of an earlier one that measured the same.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import result
from turbochain.runtime.commands import console


def main(argv: Sequence[str] | None = None) -> int:
    """Merge the named files; returns the exit status."""
    parser = argparse.ArgumentParser("merge", description=__doc__)
    parser.add_argument("sources", nargs="+", type=Path, help="results files, the oldest first")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the merged results file")
    return console.run(parser, lambda a: result.write(result.merge(*map(named, a.sources)), a.output), argv)


def named(path: Path) -> result.Result:
    """Read a results file, with its name in those runs that do not name one yet."""
    found = result.read(path)
    return replace(found, runs=tuple(replace(run, file=run.file or path.name) for run in found.runs))


if __name__ == "__main__":
    sys.exit(main())
