"""What steering does besides: the model's knowledge, its refusals, its language, and the intensity up to which each limit holds."""
