"""`python -m ckptd.launcher`: the launcher, and in its forked children the ground that user code stands on."""

import sys

if __name__ == "__main__":
    # `-m` has put the current folder first into sys.path. A job's files must not take the place of a module that the
    # launcher or its preload list means; a rank gets the entry that plain Python would have given it.
    if not sys.flags.safe_path:
        del sys.path[0]

    import os

    from ckptd.launcher.main import main
    from ckptd.launcher.stdio import flush_streams

    outcome = main(sys.argv[1:])
    if isinstance(outcome, int):
        flush_streams()
        # The exit handlers of preloaded modules belong to the ranks; here nobody has used these modules.
        os._exit(outcome)
    outcome.run()
