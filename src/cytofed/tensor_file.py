"""Named arrays as a safetensors file, written as they lie in memory.

safetensors' own writer takes all of it as bytes first, which is as much memory again. Its format:
eight bytes with the length of a JSON head, the head, the arrays' little-endian bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cytofed.files import atomically

_DTYPES = {"<f4": "F32", "<f8": "F64", "<i8": "I64", "<i4": "I32", "|u1": "U8", "|b1": "BOOL"}


def write_tensors(
    path: Path,
    arrays: Mapping[str, npt.NDArray[Any]],
    metadata: Mapping[str, str],
    *,
    over: Path | None = None,
) -> None:
    """Write ``path`` atomically: it is the old file or the new one, never a part.

    ``over``: a file that nobody needs, as in ``files.atomically``.
    """
    head: dict[str, Any] = {"__metadata__": dict(metadata)}
    plain, end = [], 0
    # The widest first: readers map the file and want each array aligned.
    for name, array in sorted(arrays.items(), key=lambda item: (-item[1].itemsize, item[0])):
        little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        head[name] = {
            "dtype": _DTYPES[little.dtype.str],
            "shape": list(array.shape),
            "data_offsets": [end, end + little.nbytes],
        }
        plain.append(little)
        end += little.nbytes
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomically(path, over=over) as part, part.open("r+b") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for little in plain:
            file.write(little.reshape(-1).view(np.uint8).data)
        file.truncate()
