"""ckptctl, one file per verb."""
