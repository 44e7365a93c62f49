"""What agent, ranks, launcher and command line say to each other."""
