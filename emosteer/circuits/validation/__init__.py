"""The stage `validate`: whether a circuit is necessary, sufficient, specific, its emotion's own, and stable."""
