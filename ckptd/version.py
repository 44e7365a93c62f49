"""The version of ckptd, in one place: the package, the manifest and the protocol hello read it here."""

__version__ = "0.1.0"
