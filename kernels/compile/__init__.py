"""Starting kernels, compiling them ahead, and keeping what was compiled."""
