"""Which units write a direction: scores, checks, ablation curves."""
