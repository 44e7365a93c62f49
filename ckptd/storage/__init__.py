"""Where checkpoints are kept: the tier contract, the shard image, the manifest and the first tiers."""
