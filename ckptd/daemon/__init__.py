"""The agent: the shell around the core that owns memory, processes, storage threads and sockets."""
