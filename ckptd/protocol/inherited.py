"""What a rank was forked with: set by its launcher in the child, read by the client there, and empty elsewhere."""

from __future__ import annotations

modules: frozenset[str] = frozenset()
"""The modules that were loaded already."""
packages: frozenset[str] = frozenset()
"""Those packages of which the launcher would load more, if it knew what."""
