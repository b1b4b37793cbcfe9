"""What is measured of codecs, ours and others, and the pages and pictures that show it."""
