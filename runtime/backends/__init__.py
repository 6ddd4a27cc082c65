"""Who reads and writes a layer's tensors: plain torch, or Triton kernels; and the door through
which transformers calls them."""
