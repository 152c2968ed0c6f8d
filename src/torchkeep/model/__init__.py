"""Wing 2: name → nn.Module."""
