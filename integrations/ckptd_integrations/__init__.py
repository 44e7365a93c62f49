"""Framework integrations that ship with ckptd."""
