"""Wing 3: what outlives the process."""
