"""What lies on disk: the .rnc container, and photographs of any kind, read and written. Knows nothing of networks."""
