"""Reads and writes files: the .rnc container and photographs of any kind. Nothing here depends on networks."""
