"""Evaluation of codecs: measurements, tables, figures and the report."""
