"""The training side: what runs inside a rank. Standard library only."""
