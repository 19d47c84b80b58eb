"""Programs as plain C libraries: kernels with a C ABI, a generated executor, no run-time library."""
