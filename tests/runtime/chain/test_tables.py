"""The columns of a chain's tables: the rows that a table's index names, without a copy if they are adjacent."""

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from turbochain.runtime import Bundle


def test_tables_share_the_rows_of_the_file(sd: Path) -> None:
    chain = Bundle.open(sd).open_chain("image-to-image")
    file, shared = load_file(sd / chain.chain.tables_file), []
    for name, table in chain.tables.items():
        index, rows = file[f"{name}/index"], table.column("time_projections")
        np.testing.assert_array_equal(rows, file["columns/time_projections"][index])
        shared.append(rows if (np.diff(index) == 1).all() else None)
    views = [rows for rows in shared if rows is not None]
    assert len(views) >= 5 and len({id(rows.base) for rows in views}) == 1
