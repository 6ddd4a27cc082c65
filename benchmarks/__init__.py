"""Measurements that the README and LOG.md quote. Not installed: `kvfold bench` finds this folder beside pyproject.toml."""
