"""Attention for less: exact in less memory, or over fewer keys, or by other mathematics; and where it is of use."""
