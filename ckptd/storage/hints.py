"""What to do about an error of the operating system, in words."""

from __future__ import annotations

import errno

_HINTS = {
    errno.ENOSPC: "free some space, lower keep_last, or use another {place}",
    errno.EDQUOT: "the quota is used up: free some space or use another {place}",
    errno.EACCES: "check the owner and mode of the folder, or use another {place}",
    errno.EPERM: "check the owner and mode of the folder, or use another {place}",
    errno.EROFS: "the filesystem is mounted read-only: use another {place}",
    errno.EEXIST: "a file stands where a folder is needed: use another {place}",
    errno.EFBIG: "files may not be that large here: raise `ulimit -f`, or use another {place}",
    errno.ENOTDIR: "a file stands where a folder is needed: use another {place}",
    errno.EIO: "the disk reports errors: look into the kernel's log",
}


def hint_for(error: OSError, place: str = "--store") -> str | None:
    """Return the hint for an error of reading or writing a file, None when there is nothing to advise.

    `place` is the flag that says where it lies.
    """
    hint = _HINTS.get(error.errno or 0)
    return None if hint is None else hint.format(place=place)
