"""Distortion of images (`distortion`), and rate-distortion curves of codecs (`curves`), which need no torch."""
