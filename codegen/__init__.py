"""Kernel families, whole-graph lowering and code generation."""
