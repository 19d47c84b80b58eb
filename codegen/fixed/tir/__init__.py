"""Every node of a fixed-point program as a TIR function on one frame, and its schedule."""
