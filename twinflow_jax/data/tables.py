"""Parquet files."""

import pyarrow
import pyarrow.parquet
from etils import epath

from twinflow_jax.errors import UserError, reason


def opened(file: epath.Path) -> pyarrow.parquet.ParquetFile:
    """Raises UserError where it is no Parquet file."""
    try:
        return pyarrow.parquet.ParquetFile(file.open("rb"))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{file} cannot be read ({reason(error)}): is it a whole Parquet file?"
        ) from error
