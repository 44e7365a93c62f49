"""Knows nothing of ckptd; fails in its first life when told to."""

import os
import sys

print("life", os.environ["CKPTD_GENERATION"], "rank", os.environ["RANK"], "of", os.environ["WORLD_SIZE"], flush=True)
if "fail" in sys.argv and os.environ["CKPTD_GENERATION"] == "1" and os.environ["RANK"] == "0":
    sys.exit(3)
