"""Who may do what: the coordinator contract and the embedded default for one node."""
