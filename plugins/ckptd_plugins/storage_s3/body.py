"""Memory as the body of a request: sent from where it lies, piece by piece, so that what stands still is noticed."""

from __future__ import annotations

PIECE_BYTES = 2**18
"""What is handed to a socket at once. The time that a request may stand still begins anew with each piece."""


class Body:
    """Memory in the shape of a file, which is what botocore takes without a copy."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._at = 0

    def __len__(self) -> int:
        return len(self._data)

    def read(self, size_bytes: int = -1) -> memoryview:
        """Return the next bytes, and more than was asked for when that was little: HTTP asks for 16 KiB at a time."""
        everything = size_bytes is None or size_bytes < 0
        end = len(self._data) if everything else self._at + max(size_bytes, PIECE_BYTES)
        found = self._data[self._at : end]
        self._at += len(found)
        return found

    def tell(self) -> int:
        """Return where the next bytes are."""
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go somewhere else."""
        self._at = offset + (0, self._at, len(self._data))[whence]
        return self._at
