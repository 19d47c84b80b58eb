"""What the kernels of all processors share: vector words, tiled GEMM, row-wise, attention, embedding and rotary kernels."""
