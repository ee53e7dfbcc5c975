"""Readers for common file formats: JSON, tables, parquet, messages, and well-known data sets."""
