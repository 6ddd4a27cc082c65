"""What runs on the device: the functions that the kernels are made of."""
