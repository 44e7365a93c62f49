"""A training that needs a part of a package which is preloaded, as scripts need parts of transformers."""

import os
import runpy
import sys

from lazy_package import part

print(f"part was imported {'here' if os.getpid() == part.IMPORTED_BY else 'before'}", flush=True)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
