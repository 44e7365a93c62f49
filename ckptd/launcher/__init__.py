"""The job's small parent process: imports the heavy modules once and forks ranks from there."""
