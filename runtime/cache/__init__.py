"""The packed cache and what it is made of: layers, their 16-bit windows, page tables and pools."""
