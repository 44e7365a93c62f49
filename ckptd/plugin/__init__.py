"""The extension surface: hookspecs and the manager that loads plugins."""
