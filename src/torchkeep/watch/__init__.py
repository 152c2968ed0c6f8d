"""Wing 4: what a person sees."""
