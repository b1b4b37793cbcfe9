"""Evaluation of codecs: measurements, tables, figures and the report.

`rnncodec.evaluate` is its function, `rnncodec evaluate` its command. Import the rest from the modules: most of them
need the extra `eval`.
"""
