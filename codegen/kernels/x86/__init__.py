"""Kernels for x86 processors with AVX2 or more: integer GEMM, weight-only GEMM, and the vector math they share."""
