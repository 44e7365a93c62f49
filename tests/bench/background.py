"""A second program that writes buffered files without a pause, as an unlucky neighbour on the same disk does."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

FILE_BYTES = 256 * 2**20
FILES = 4


class Writer:
    """Runs the second program while it is open. With `active` false it is another rank's, and nothing is done."""

    def __init__(self, folder: Path, *, active: bool) -> None:
        self._folder, self._active = folder, active
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        if self._active:
            self._process = subprocess.Popen([sys.executable, __file__, str(self._folder)])
        time.sleep(1.0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for number in range(FILES):
                (self._folder / f"neighbour{number}").unlink(missing_ok=True)
        os.sync()


def main(folder: Path) -> None:
    """Write files over and over, until killed."""
    block = os.urandom(2**20)
    number = 0
    while True:
        with (folder / f"neighbour{number % FILES}").open("wb") as file:
            for _ in range(FILE_BYTES // len(block)):
                file.write(block)
        number += 1


if __name__ == "__main__":
    main(Path(sys.argv[1]))
