"""Folders whose names survive a power cut."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def make_folders(folder: Path) -> None:
    """Create a folder and its parents so that their names survive a power cut too."""
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    if missing:
        sync_name(folder)
    for new in reversed(missing):
        new.mkdir(exist_ok=True)
        sync_folder(new.parent)


def sync_name(folder: Path) -> None:
    """Make the name of a folder durable: whoever made it may have been killed before that was done."""
    with contextlib.suppress(PermissionError):  # the parent is somebody else's, and so was the making
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable: those that came, and those that went."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
