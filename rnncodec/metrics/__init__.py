"""Measures of quality: distortion of images (`distortion`), and rate-distortion curves of codecs (`curves`).

Import from these modules: `curves` needs no torch, and this package loads neither.
"""
