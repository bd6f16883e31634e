"""The kernels of `distkgd.kernels` for GPUs, in Triton."""
