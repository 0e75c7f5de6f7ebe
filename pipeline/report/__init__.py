"""What a run's networks are worth, read from the figures that its jobs left: tables, and accuracy against cost."""
