"""The decode loop. It uses only the backend interface in `backends/base.py`."""
