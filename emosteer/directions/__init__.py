"""Reading states, contrasts, and directions."""
