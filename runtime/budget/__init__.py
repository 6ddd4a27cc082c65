"""What a byte budget means: the policies that make room in a cache, or refuse."""
