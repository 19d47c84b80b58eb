"""A fixed-point program as text: C99 and HLS C++ from scheduled TIR, and an ONNX model of integer operators."""
