"""Row-wise ops."""
