"""Wing 1: sample id → batch."""
