"""Bridges to other programs, one file each; every one imports its program when it is itself imported, not before."""
