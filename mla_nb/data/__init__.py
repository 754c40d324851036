"""Data: preprocessing, the prepared format, and one module per dataset."""
