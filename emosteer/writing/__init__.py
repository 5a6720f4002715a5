"""Jobs to replies to files; the contest's writer; the model's own bank."""
