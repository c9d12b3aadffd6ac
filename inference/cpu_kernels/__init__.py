"""Decoder layers and linear layers in C++ for generation in fp32 on CPU."""
