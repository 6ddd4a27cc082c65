"""What stands between transformers and the cache: options, hooks around every call, and the gate
that checks what it brings."""
