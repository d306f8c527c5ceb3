"""What differs between NPU, CUDA and CPU, and nothing else does: device calls, kernels, environment variables, library versions."""
