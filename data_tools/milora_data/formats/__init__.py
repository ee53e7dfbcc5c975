"""Readers of everybody's files: JSON, tables, parquet, messages, and the layouts of well-known data sets."""
