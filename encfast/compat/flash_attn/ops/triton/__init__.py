"""The module paths of flash-attn's Triton kernels; the functions run on any device."""
