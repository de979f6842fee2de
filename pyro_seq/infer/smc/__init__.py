"""What the particle methods have in common."""
