"""Decisions without IO: state machines, lineage, restore planning and policies."""
