"""The launcher: a job's small parent process that imports once what every rank needs, and forks the ranks.

The agent uses `command` (what to start, and how) and `environment` (what a rank sees); everything else runs in the
launcher itself, or in a rank that it has just forked. README.md beside this file says why, and lists the traps.
"""
