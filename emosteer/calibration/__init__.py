"""Default strengths and the dial."""
