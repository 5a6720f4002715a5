"""The contest: controls, metrics, doses, bootstrap."""
