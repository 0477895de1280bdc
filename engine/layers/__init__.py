"""A model's layers in other forms: packed, merged, fused, as a device computes them fastest."""
