"""What is gathered of a failure before its processes are gone: see `collect`."""
