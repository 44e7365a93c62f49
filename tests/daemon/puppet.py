"""A rank that does what its test says: Python source in one line of JSON, `result` back in another."""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any

import ckptd
from tests.daemon.bytes_framework import FAULTS


def main() -> None:
    """Serve the test until it closes the pipe."""
    answers = os.fdopen(os.dup(1), "w")
    space: dict[str, Any] = {"ckptd": ckptd, "os": os, "sys": sys, "FAULTS": FAULTS, "result": None}
    for line in sys.stdin:
        space["result"] = None
        try:
            exec(json.loads(line), space)
            answer = {"result": space["result"]}
        except Exception as error:
            answer = {
                "kind": type(error).__name__,
                "code": getattr(error, "code", None),
                "message": str(error),
                "traceback": traceback.format_exc(),
            }
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
