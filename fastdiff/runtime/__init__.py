"""The machine: devices, CUDA graphs, ranks, signals, output."""
