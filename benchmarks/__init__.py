"""Measurements that the README and docs/ quote: commands, not tests."""
