"""The step of the lean forward pass in C++, compiled on the user's machine where it has a compiler; see `step.cpp` and docs/SPEED.md."""
