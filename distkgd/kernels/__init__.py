"""Compiled inner loops: C++ for CPUs, Triton for GPUs.

Each has an equal in plain torch, which is used where a kernel cannot be had; results differ by rounding only.
"""
