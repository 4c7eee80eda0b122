"""From a file of configs/ and the gin files it names to a running job: `python -m launch --config=configs/local.py`."""
