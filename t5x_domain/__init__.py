"""Pretrain and adapt transformers to a domain with JAX on TPU and GPU meshes."""

__version__ = "0.1.0"
