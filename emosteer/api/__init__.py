"""The public API: load, steer, generate, and the stages as functions. `emosteer` itself hands it on."""
