"""What to do about an error of the operating system, in words."""

from __future__ import annotations

import errno

_HINTS = {
    errno.ENOSPC: "free some space, lower keep_last, or use another --store",
    errno.EDQUOT: "the quota is used up: free some space or use another --store",
    errno.EACCES: "check the owner and mode of the folder, or use another --store",
    errno.EPERM: "check the owner and mode of the folder, or use another --store",
    errno.EROFS: "the filesystem is mounted read-only: use another --store",
    errno.EEXIST: "a file stands where a folder is needed: use another --store",
    errno.EFBIG: "files may not be that large here: raise `ulimit -f`, or use another --store",
    errno.ENOTDIR: "a file stands where a folder is needed: use another --store",
    errno.EIO: "the disk reports errors: look into the kernel's log",
}


def hint_for(error: OSError) -> str | None:
    """Return the hint for an error of reading or writing a file, None when there is nothing to advise."""
    return _HINTS.get(error.errno or 0)
