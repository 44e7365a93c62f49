"""Plugins that ship with ckptd: tiers and detectors, loaded through the same entry points as anyone's."""
